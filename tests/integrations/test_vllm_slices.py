"""Tensor parallelism by arithmetic alone: slices of a packed matrix against slices of its dense weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ernieq.errors import ShapeError, UsageError
from ernieq.integrations.vllm.slices import MatrixSlice, slice_columns, slice_rows
from ernieq.integrations.vllm.storage import unpack_signs
from ernieq.pack.layout import pack_signs
from ernieq.trellis import EncodedMatrix
from tests.decode.encoded_matrices import plain_weight, random_matrix

BITS = [1.5, 2, 2.5, 3, 4.5, 6, 8]


def stored(matrix: EncodedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of a packed file."""
    return (
        torch.from_numpy(matrix.packed),
        torch.from_numpy(matrix.scale),
        torch.from_numpy(pack_signs(matrix.signs)),
    )


def sliced(matrix: EncodedMatrix, piece: MatrixSlice) -> EncodedMatrix:
    packed, scale, signs = stored(matrix)
    return EncodedMatrix(
        piece.tiles(packed).contiguous().numpy(),
        piece.scale(scale).numpy(),
        unpack_signs(piece.signs(signs)).numpy(),
        matrix.rotation_block,
        matrix.code,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_slice_of_rows_decodes_to_the_rows_of_the_dense_weight(bits: float, size: int) -> None:
    matrix = random_matrix(96, 64, bits)
    for rank in range(size):
        piece = slice_rows("m", 96, 64, rank, size)
        found = plain_weight(sliced(matrix, piece))
        assert torch.equal(found, piece.dense(plain_weight(matrix)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_slice_of_columns_decodes_to_the_columns_of_the_dense_weight(bits: float, size: int) -> None:
    matrix = dataclasses.replace(random_matrix(48, 384, bits), rotation_block=32)
    for rank in range(size):
        piece = slice_columns("m", 48, 384, 32, rank, size)
        found = plain_weight(sliced(matrix, piece))
        torch.testing.assert_close(found, piece.dense(plain_weight(matrix)), rtol=0, atol=1e-6)


def test_the_matrices_of_the_21b_can_be_cut_for_two_and_four_processes() -> None:
    for size in (2, 4):
        for out, inputs in ((2560, 1536), (2560, 3072), (2560, 12288), (2560, 2560)):  # down, shared, dense, o
            assert slice_columns("m", out, inputs, 128, size - 1, size).columns == inputs // size
        for out, inputs in ((1536, 2560), (3072, 2560), (12288, 2560), (2560, 2560), (512, 2560)):
            assert slice_rows("m", out, inputs, size - 1, size).rows == out // size


def test_a_slice_within_a_rotation_block_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^x\.down_proj can't be cut for 8 .* multiple of 128 "):
        slice_columns("x.down_proj", 2560, 1536, 128, 0, 8)


def test_a_slice_within_a_tile_is_refused() -> None:
    with pytest.raises(UsageError, match=r"multiple of 16 of its 96 outputs; .* divides 6$"):
        slice_rows("x", 96, 64, 0, 4)


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="5 tensor-parallel processes"):
        slice_rows("x", 96, 64, 0, 5)


def test_a_stored_tensor_of_another_shape_is_refused_by_name() -> None:
    packed, scale, signs = stored(random_matrix(96, 64))
    piece = slice_rows("layer.q_proj", 96, 128, 0, 1)
    with pytest.raises(ShapeError, match=r"layer\.q_proj\.weight_packed has shape \(6, 4, 32\)"):
        piece.tiles(packed)
    with pytest.raises(ShapeError, match=r"layer\.q_proj\.weight_signs"):
        piece.signs(signs)
    with pytest.raises(ShapeError, match=r"weight_scale has shape \(96,\)"):
        slice_rows("layer.q_proj", 64, 64, 0, 1).scale(scale)
