"""Packed linear layers against plain ones with the decoded weight."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ernieq.decode import TrellisLinear
from ernieq.errors import BackendUnavailableError
from ernieq.kernels import Backend
from ernieq.trellis import EncodedMatrix
from tests.decode.encoded_matrices import plain_weight, random_matrix


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.REFERENCE])
@pytest.mark.parametrize(
    ("rows", "columns", "bits"),
    [(48, 64, 2), (32, 144, 3), (16, 256, 4), (64, 48, 6), (32, 48, 2.5), (16, 80, 8)],
)
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_packed_linear_equals_a_plain_one_with_its_decoded_weight(
    rows: int, columns: int, bits: float, tokens: int, backend: Backend
) -> None:
    matrix = random_matrix(rows, columns, bits)
    bias = torch.linspace(-1, 1, rows)
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, plain_weight(matrix), bias)
    found = TrellisLinear.from_encoded(matrix, bias, backend=backend)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_decoded_rows_are_those_of_the_plain_weight() -> None:
    matrix = random_matrix(64, 96, 3)
    linear = TrellisLinear(matrix)
    torch.testing.assert_close(linear.decode_rows(), plain_weight(matrix), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        linear.decode_rows(slice(16, 48)), plain_weight(matrix)[16:48], rtol=0, atol=1e-6
    )


def test_an_input_that_was_rotated_before_is_not_rotated_again() -> None:
    linear = TrellisLinear(random_matrix(32, 64))
    x = torch.randn(3, 64)
    assert torch.equal(linear.forward_rotated(linear.rotate(x)), linear(x))


def test_the_output_has_the_dtype_of_the_input() -> None:
    linear = TrellisLinear(random_matrix(32, 64), torch.zeros(32))
    x = torch.randn(3, 64).bfloat16()
    assert linear(x).dtype is torch.bfloat16
    torch.testing.assert_close(linear(x), linear(x.float()).bfloat16())


def test_packed_tiles_are_not_copied_from_a_mapped_file(tmp_path: Path) -> None:
    matrix = random_matrix(32, 64)
    matrix.packed.tofile(tmp_path / "tiles")
    mapped = np.memmap(tmp_path / "tiles", np.int16, mode="r", shape=matrix.packed.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear = TrellisLinear(
            EncodedMatrix(mapped, matrix.scale, matrix.signs, matrix.rotation_block, matrix.code)
        )
    assert linear.packed.data_ptr() == mapped.ctypes.data
    x = torch.randn(1, 64)
    assert torch.equal(linear(x), TrellisLinear(matrix)(x))


def test_a_conversion_leaves_the_code_as_it_is() -> None:
    linear = TrellisLinear(random_matrix(32, 64), torch.ones(32))
    x = torch.randn(2, 64)
    before = linear(x)
    linear.to(torch.bfloat16).double()
    assert linear.scale.dtype is torch.float16
    assert torch.equal(linear(x), before)


def test_a_move_to_another_device_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="can't be moved"):
        TrellisLinear(random_matrix(32, 64)).to("meta")
