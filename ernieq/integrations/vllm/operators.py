"""The products of packed layers as operators of torch, which a compiler and a captured graph take as they are.

    ernieq::packed_linear    all parts of a merged linear layer
    ernieq::packed_rows      rows of an embedding by number
    ernieq::packed_experts   the experts that each token selected, weighted and summed (experts_operator.py)

Tiles that are int16 units are for the C++ kernels of the CPU, int32 words for those of a GPU. Nothing here
waits for the GPU, so that a step can be captured. Shapes: N tokens, C input channels, R output channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernieq.decode import gpu
from ernieq.integrations.vllm.geometry import MatrixPart, part_rows, part_tiles, read_parts
from ernieq.kernels.hadamard import rotate, unrotate
from ernieq.kernels.trellis_matmul import decode, matmul
from ernieq.trellis import TILE_SIDE

# Tokens whose bands are decoded at a time in a lookup: 84 MB of float32 at a width of 2560.
_LOOKUP_TOKENS = 512


def holds_words(tiles: Tensor) -> bool:
    """Whether tiles are in the form that a GPU's kernels read."""
    return tiles.dtype == torch.int32


@torch.library.custom_op("ernieq::packed_linear", mutates_args=())
def packed_linear(x: Tensor, tiles: Tensor, scale: Tensor, signs: Tensor, parts: Sequence[int]) -> Tensor:
    """Products with all matrices of a merged layer.

    Args:
        x: (..., C).
        tiles: of all parts behind each other, flat: int16 units on the CPU, int32 words on a GPU.
        scale: (R,) float16, of all parts.
        signs: (parts, C) int8, or (1, C) if they are equal in all parts; the input is then rotated once.
        parts: the numbers of ``part_numbers``.

    Returns:
        (..., R) in the dtype of ``x``; sums are formed in float32.
    """
    matrices = read_parts(parts)
    rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous()  # (N, C)
    product = _linear_on_gpu if holds_words(tiles) else _linear_on_cpu
    out = product(rows, part_tiles(tiles, matrices), scale, signs, matrices)
    return out.to(x.dtype).view(*x.shape[:-1], scale.shape[0])


@packed_linear.register_fake
def _shape_of_linear(x: Tensor, _tiles: Tensor, scale: Tensor, _signs: Tensor, _parts: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _linear_on_cpu(
    rows: Tensor, tiles: Sequence[Tensor], scale: Tensor, signs: Tensor, parts: Sequence[MatrixPart]
) -> Tensor:
    rotated = [rotate(rows, own, parts[index].rotation_block) for index, own in enumerate(signs)]
    out = torch.empty(rows.shape[0], scale.shape[0])
    for index, (part, own) in enumerate(zip(parts, part_rows(parts), strict=True)):
        out[:, own] = matmul(rotated[index % len(rotated)], tiles[index], scale[own], part.code)
    return out


def _linear_on_gpu(
    rows: Tensor, words: Sequence[Tensor], scale: Tensor, signs: Tensor, parts: Sequence[MatrixPart]
) -> Tensor:
    rotated = [gpu.rotate_half(rows, own, parts[index].rotation_block) for index, own in enumerate(signs)]
    outputs = [
        gpu.multiply(rotated[index % len(rotated)], words[index], scale[own], part.code)
        for index, (part, own) in enumerate(zip(parts, part_rows(parts), strict=True))
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@torch.library.custom_op("ernieq::packed_rows", mutates_args=())
def packed_rows(
    ids: Tensor, tiles: Tensor, scale: Tensor, signs: Tensor, part: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Rows of an embedding table.

    Args:
        ids: (...) int64, each below R.
        tiles: flat, as of ``packed_linear``.
        scale: (R,) float16.
        signs: (1, C) int8.
        part: the numbers of the one part.
        dtype: of the result.

    Returns:
        (..., C).
    """
    (matrix,) = read_parts(part)
    (bands,) = part_tiles(tiles, [matrix])
    flat = ids.reshape(-1)
    table = torch.empty(flat.shape[0], matrix.columns, dtype=dtype, device=ids.device)
    for start in range(0, flat.shape[0], _LOOKUP_TOKENS):
        some = flat[start : start + _LOOKUP_TOKENS]
        table[start : start + _LOOKUP_TOKENS] = _lookup(some, bands, scale, signs[0], matrix).to(dtype)
    return table.view(*ids.shape, matrix.columns)


@packed_rows.register_fake
def _shape_of_rows(
    ids: Tensor, _tiles: Tensor, scale: Tensor, signs: Tensor, _part: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return scale.new_empty(*ids.shape, signs.shape[1], dtype=dtype)


def _lookup(ids: Tensor, tiles: Tensor, scale: Tensor, signs: Tensor, part: MatrixPart) -> Tensor:
    """(n,) to (n, C) float32: the band of 16 rows of each token is decoded, and its row taken."""
    band = ids // TILE_SIDE
    own_tiles = tiles.index_select(0, band)  # (n, C / 16, ...)
    own_scale = scale.view(-1, TILE_SIDE).index_select(0, band).flatten()  # (16 n,)
    decoded = gpu.decode_exactly if holds_words(tiles) else decode
    rows = decoded(own_tiles, own_scale, part.code)  # (16 n, C)
    place = torch.arange(ids.shape[0], device=ids.device) * TILE_SIDE + ids % TILE_SIDE
    return unrotate(rows.index_select(0, place), signs, part.rotation_block)
