"""Rows of a quantized matrix, decoded and turned back: compiled as in the plain reference."""

from __future__ import annotations

import numpy as np
import pytest

from ernieq.kernels import Backend, matrix_rows
from ernieq.trellis import RATES
from tests.pack.packed_factory import random_matrix


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize("block", [1, 16, 128])
def test_compiled_and_plain_decoding_give_the_same_rows(bits: float, block: int) -> None:
    matrix = random_matrix(32, 128, bits, block=block, seed=int(10 * bits))
    plain = matrix_rows.decode(matrix, backend=Backend.REFERENCE)
    compiled = matrix_rows.decode(matrix, threads=1)
    np.testing.assert_allclose(compiled, plain, atol=1e-5 * np.abs(plain).max())


def test_a_row_of_one_weight_is_its_value_turned_back() -> None:
    """The definition of FORMAT.md, section 3, written out for a rotation of two channels."""
    matrix = random_matrix(16, 16, 2, block=2, seed=4)
    rotated = matrix.rotated_weight().astype(np.float64)
    expected = np.empty_like(rotated)
    expected[:, 0::2] = (rotated[:, 0::2] + rotated[:, 1::2]) / 2**0.5
    expected[:, 1::2] = (rotated[:, 0::2] - rotated[:, 1::2]) / 2**0.5
    found = matrix_rows.decode(matrix, backend=Backend.REFERENCE)
    np.testing.assert_allclose(found, expected * matrix.signs, rtol=1e-6, atol=1e-9)
