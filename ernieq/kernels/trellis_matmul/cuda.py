"""Products with packed matrices on a GPU, and their decoding; the truth is ``reference.py``.

Inputs are float16 with a float32 factor per row (``kernels.token_step``), sums are float32. Nothing here waits
for the GPU. Letters: R output channels, C input channels, E matrices of one shape, K bits a
weight, T tokens.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ernieq.errors import ShapeError
from ernieq.kernels.cuda import CudaKernel, cuda_kernel
from ernieq.trellis import TILE_SIDE, TrellisCode

# Tokens that ``multiply_selected`` takes: a product per pair of token and expert, each decoding its own tiles.
SELECTED_LIMIT = 8
_DECODE = Path(__file__).with_name("decode.cu")
_MULTIPLY_FEW = Path(__file__).with_name("multiply_few.cu")
_MULTIPLY_MANY = Path(__file__).with_name("multiply_many.cu")
_RESIDENT_WARPS = 40  # of a multiprocessor, in products of a few tokens; kResidentWarps in multiply_few.cu
_MANY_WARPS = 8
_STRIP_BYTES = 3 * 2 * (64 + 8)  # of a token: kStages strips of kStride float16 numbers in multiply_many.cu
_DECODE_WARPS = 4
_DECODED_RUN = 4  # tiles that a warp decodes
_TOKEN_GROUPS = (1, 2, 4, 8, 16)  # groups of eight tokens that may share a decoded tile


def to_words(packed: Tensor) -> Tensor:
    """Rings as words of 32 bits, first bit highest: (..., 16 K) int16 -> (..., 8 K) int32, same device."""
    pairs = packed.contiguous().view(torch.int32)
    return (pairs << 16) | ((pairs >> 16) & 0xFFFF)


def decode(
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights in the rotated basis.

    Args:
        words: (R / 16, C / 16, 8 K) int32 from ``to_words``.
        scale: (R,) float16.
        code: the trellis code.
        out: (R, C) to write to, in place of a new tensor.
        dtype: float32 gives the bits of the reference, float16 those rounded once more.

    Raises:
        ShapeError: the parts do not fit together.
        BackendUnavailableError: the GPU can't run the kernel.
    """
    _check(words.shape, scale.shape, code, 0)
    row_tiles, column_tiles, _ = words.shape
    if out is None:
        shape = row_tiles * TILE_SIDE, column_tiles * TILE_SIDE
        out = torch.empty(shape, dtype=dtype, device=words.device)
    name = "trellis_decode_float32" if out.dtype == torch.float32 else "trellis_decode_float16"
    runs = row_tiles * -(-column_tiles // _DECODED_RUN)
    with torch.cuda.device(words.device):
        kernel = _kernel(_DECODE, name, code, WARPS=_DECODE_WARPS)
        kernel((-(-runs // _DECODE_WARPS),), 32 * _DECODE_WARPS, words, scale, out, row_tiles, column_tiles)
    return out


def multiply(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, code: TrellisCode, *, out: Tensor | None = None
) -> Tensor:
    """Multiply tokens with one matrix while it is decoded.

    Args:
        x: (T, C) float16, rotated; the inputs are ``x * x_scale``.
        x_scale: (T,) float32.
        words: (R / 16, C / 16, 8 K) int32.
        scale: (R,) float16.
        code: the trellis code.
        out: (T, R) float32 to write to.

    Returns:
        (T, R) float32.

    Raises:
        ShapeError: the parts do not fit together.
        BackendUnavailableError: the GPU can't run the kernel.
    """
    if x.shape[0] <= SELECTED_LIMIT:
        return _multiply_few(x, x_scale, words[None], scale[None], code, None, out, x.shape[0], 1)
    return _multiply_many(x, x_scale, words[None], scale[None], code, None, out)


def multiply_selected(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    selected: Tensor,
    shared_input: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply a few tokens with the matrices that each selected.

    Args:
        x: (N, C) float16, rotated: N = T with a shared input, else T k.
        x_scale: (N,) float32.
        words: (E, R / 16, C / 16, 8 K) int32.
        scale: (E, R) float16.
        code: the trellis code.
        selected: (T, k) int32.
        shared_input: whether the k matrices of a token read the same input row.
        out: (T k, R) float32 to write to.

    Returns:
        (T k, R) float32, row ``t k + i`` of matrix ``selected[t, i]``.

    Raises:
        ShapeError: the parts do not fit together.
        BackendUnavailableError: the GPU can't run the kernel.
    """
    share = selected.shape[1] if shared_input else 1
    return _multiply_few(x, x_scale, words, scale, code, selected, out, selected.numel(), share)


def multiply_grouped(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply tokens that are sorted by matrix, each tile decoded once for up to 64 of them.

    Args:
        x: (N, C) float16, rotated, sorted by matrix.
        x_scale: (N,) float32.
        words: (E, R / 16, C / 16, 8 K) int32.
        scale: (E, R) float16.
        code: the trellis code.
        offsets: (E + 1,) int32, matrix e multiplies rows ``offsets[e]`` to ``offsets[e + 1]``.
        out: (N, R) float32 to write to.

    Returns:
        (N, R) float32.

    Raises:
        ShapeError: the parts do not fit together.
        BackendUnavailableError: the GPU can't run the kernel.
    """
    return _multiply_many(x, x_scale, words, scale, code, offsets, out)


def _multiply_few(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    selected: Tensor | None,
    out: Tensor | None,
    outputs: int,
    share: int,
) -> Tensor:
    _check(words.shape[1:], scale.shape[1:], code, x.shape[1])
    rows, columns = scale.shape[1], x.shape[1]
    if out is None:
        out = torch.empty(outputs, rows, dtype=torch.float32, device=x.device)
    products = 1 if selected is None else outputs
    with torch.cuda.device(x.device):
        warps = _warps(products * rows // TILE_SIDE, torch.cuda.current_device())
        kernel = _kernel(_MULTIPLY_FEW, "trellis_multiply", code, WARPS=warps)
        kernel(
            (rows // TILE_SIDE, products), 32 * warps,
            x, x_scale, words, scale, selected, out, rows, columns, outputs, share,
        )  # fmt: skip
    return out


def _multiply_many(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    offsets: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    _check(words.shape[1:], scale.shape[1:], code, x.shape[1])
    (tokens, columns), (matrices, rows) = x.shape, scale.shape
    if out is None:
        out = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    expected = -(-tokens // matrices)  # tokens of a matrix, if all had the same
    groups = next(n for n in _TOKEN_GROUPS if 8 * n >= expected or n == _TOKEN_GROUPS[-1])
    parts = -(-tokens // (8 * groups)) if offsets is None else 1
    with torch.cuda.device(x.device):
        kernel = _kernel(_MULTIPLY_MANY, "trellis_multiply_many", code, WARPS=_MANY_WARPS, TOKEN_TILES=groups)
        kernel(
            (-(-rows // (TILE_SIDE * _MANY_WARPS)), matrices, parts), 32 * _MANY_WARPS,
            x, x_scale, words, scale, offsets, out, rows, columns, tokens,
            shared_bytes=_STRIP_BYTES * 8 * groups,
        )  # fmt: skip
    return out


@lru_cache(maxsize=256)
def _warps(blocks: int, device: int) -> int:
    """Warps that divide a row of tiles, so that one wave of blocks fills the GPU."""
    wanted = torch.cuda.get_device_properties(device).multi_processor_count * _RESIDENT_WARPS / blocks
    return next(warps for warps in (16, 8, 4, 2) if warps <= wanted or warps == 2)


def _kernel(source: Path, name: str, code: TrellisCode, **constants: int) -> CudaKernel:
    return cuda_kernel(source, name, PAIR_BITS=code.pair_bits, L=code.state_bits, **constants)


def _check(words: tuple[int, ...], scale: tuple[int, ...], code: TrellisCode, columns: int) -> None:
    if len(words) != 3 or words[2] != code.units_per_tile // 2:
        raise ShapeError(
            f"packed words have shape {tuple(words)}; "
            f"expected (rows / 16, columns / 16, {code.units_per_tile // 2})"
        )
    if tuple(scale) != (words[0] * TILE_SIDE,):
        raise ShapeError(f"scale has shape {tuple(scale)}; expected ({words[0] * TILE_SIDE},)")
    if columns and columns != words[1] * TILE_SIDE:
        raise ShapeError(f"inputs have {columns} channels; the matrix takes {words[1] * TILE_SIDE}")
