"""Encode matrices where they are, on a GPU: many of equal shape in one batch, or a tall one in pieces of rows.

The steps are those of ``matrix.py``. Nothing but packed rings, scales and a few sums goes to the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.encode.batch_feedback import encode_ldlq_batch
from ernieq.encode.curvature import Basis, Curvature
from ernieq.encode.incoherence import rotation_block
from ernieq.encode.memory import Batches
from ernieq.encode.options import EncodeOptions, EncodingResult
from ernieq.encode.ring_tensors import pack_rings
from ernieq.encode.scales import fitted_scale, initial_scale, to_float16
from ernieq.errors import ShapeError
from ernieq.kernels.precision import float32_products
from ernieq.trellis import TILE_SIDE, VALUE_UNIT, EncodedMatrix, TrellisCode

# Bytes a weight takes while it is encoded: the target, its rotation, that with its blocks in order and a copy
# that errors are fed into (4 each), symbols (1), values (2), decoded (2), and room for the product that feeds
# errors back (4).
_BYTES_PER_WEIGHT = 25
_BYTES_PER_HESSIAN_ENTRY = 16  # as it came, rotated, its factor, and room for a rotation


def working_bytes(rows: int, columns: int) -> int:
    """GPU memory that one matrix, or stack of matrices with one Hessian, takes while it is encoded."""
    return _BYTES_PER_WEIGHT * rows * columns + _BYTES_PER_HESSIAN_ENTRY * columns**2


def check_shapes(weights: Mapping[str, Tensor]) -> None:
    """Refuse matrices that can't be cut into tiles.

    Raises:
        ShapeError: a side of a matrix is not a multiple of 16.
    """
    for name, weight in weights.items():
        if any(side % TILE_SIDE for side in weight.shape):
            raise ShapeError(
                f"{name} has shape {tuple(weight.shape)}; the trellis code needs sides that are multiples of 16"
            )


def encode_batch(
    stacks: Sequence[Mapping[str, Tensor]],
    hessians: Sequence[Tensor],
    signs: NDArray[np.int8],
    code: TrellisCode,
    options: EncodeOptions,
    on_block: Callable[[int], None] | None = None,
) -> list[dict[str, EncodingResult]]:
    """Encode several stacks of matrices, each with a Hessian of its own, together.

    Args:
        stacks: for each Hessian name -> (out_features, in_features); all stacks have the same shapes in
            the same order.
        hessians: (in_features, in_features) float32 each, in the model's own basis, on the device that works.
        signs: (in_features,) int8 of the rotation that all share.
        code: the trellis code.
        options: see ``EncodeOptions``; the memory is the caller's business here.
        on_block: called with the number of weights after each block of columns.

    Returns:
        For each stack name -> result; the decoded weights are float32 on the CPU and float16 on a GPU.

    Raises:
        ShapeError, NonFiniteError: as ``encode_matrices``.
        torch.OutOfMemoryError: the batch is too large for the GPU.
    """
    for stack in stacks:
        check_shapes(stack)
    basis = Basis(signs, hessians[0].device)
    with float32_products(basis.device, tensor_cores=False):
        curved = Curvature.of(hessians, [next(iter(stack)) for stack in stacks], basis, options)
        first = stacks[0].values()
        rows, columns = sum(weight.shape[0] for weight in first), len(signs)
        rotated = torch.empty(len(stacks), rows, columns, device=basis.device)
        for target, stack in zip(rotated, stacks, strict=True):
            target.copy_(basis.rotated(torch.cat([weight.float() for weight in stack.values()])))
        coded = _encode_rows(rotated, curved, basis, code, options, on_block)
    packed, scale, sums = coded.packed.cpu().numpy(), coded.scale.cpu().numpy(), coded.sums.cpu()
    return [
        cut_apart(stack, packed[place], scale[place], coded.decoded[place], signs, code, _errors(sums[place]))
        for place, stack in enumerate(stacks)
    ]


def encode_in_pieces(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    signs: NDArray[np.int8],
    code: TrellisCode,
    options: EncodeOptions,
    on_block: Callable[[int], None] | None = None,
) -> dict[str, EncodingResult]:
    """``encode_matrices`` on the device of the Hessian, as many rows at a time as its memory takes.

    Rows meet only in their Hessian, so the pieces change nothing. The weights may lie on another device, where
    the decoded ones are put too.

    Raises:
        BackendUnavailableError: not even one row of tiles fits.
    """
    basis = Basis(signs, hessian.device)
    columns, total = len(signs), sum(weight.shape[0] for weight in weights.values())
    home = next(iter(weights.values())).device
    packed = np.empty((total // TILE_SIDE, columns // TILE_SIDE, code.units_per_tile), dtype=np.int16)
    scale = np.empty(total, dtype=np.float16)
    decoded = torch.empty(total, columns, dtype=_decoded_dtype(basis.device), device=home)
    sums = torch.empty(total, len(_SUMS), dtype=torch.float64)
    with float32_products(basis.device, tensor_cores=False):
        curved = Curvature.of([hessian], [next(iter(weights))], basis, options)

        def encode_piece(row_tiles: Sequence[int]) -> None:
            rows = slice(row_tiles[0] * TILE_SIDE, (row_tiles[-1] + 1) * TILE_SIDE)
            rotated = basis.rotated(_stacked(weights, rows, basis.device))[None]
            coded = _encode_rows(rotated, curved, basis, code, options, on_block)
            packed[row_tiles[0] : row_tiles[-1] + 1] = coded.packed[0].cpu().numpy()
            scale[rows] = coded.scale[0].cpu().numpy()
            decoded[rows] = coded.decoded[0].to(home)
            sums[rows] = coded.sums[0].cpu()

        row_batches(total, columns, options).run(range(total // TILE_SIDE), encode_piece)
    return cut_apart(weights, packed, scale, decoded, signs, code, _errors(sums))


def row_batches(rows: int, columns: int, options: EncodeOptions) -> Batches:
    """How many rows of tiles of a matrix are worked on at once."""
    fit = rows // TILE_SIDE if options.memory_bytes is None else _tiles_that_fit(columns, options.memory_bytes)
    return Batches(fit, "rows of tiles", options.on_notice)


def as_handed_on(plain: Tensor) -> Tensor:
    """Decoded weights, in the model's own basis, as they are handed on: float32, or float16 from a GPU."""
    dtype = _decoded_dtype(plain.device)
    limit = torch.finfo(dtype).max
    return plain.clamp_(-limit, limit).to(dtype)


# What is summed over every row: the loss and the power under the Hessian, and without it.
_SUMS = ("loss", "power", "squared error", "square")


@dataclass(frozen=True)
class _CodedRows:
    """Rows of B matrices on the device.

    Args:
        packed: (B, rows / 16, columns / 16, 16 K) int16.
        scale: (B, rows) float16.
        decoded: (B, rows, columns) in the model's own basis.
        sums: (B, rows, 4) float64, see ``_row_sums``.
    """

    packed: Tensor
    scale: Tensor
    decoded: Tensor
    sums: Tensor


def _encode_rows(
    rotated: Tensor,
    curved: Curvature,
    basis: Basis,
    code: TrellisCode,
    options: EncodeOptions,
    on_block: Callable[[int], None] | None,
) -> _CodedRows:
    """Scales, LDLQ, fitted scales: (B, rows, columns) float32 in the rotated basis."""
    scale = initial_scale(rotated, code.bits_per_weight)
    symbols, values = encode_ldlq_batch(
        curved.ordered(rotated),
        curved.factors,
        scale.float(),
        code,
        first_pass_steps=options.first_pass_steps,
        backend=options.backend,
        threads=options.threads,
        on_block=on_block,
    )
    symbols, values = curved.put_back(symbols, values)
    matrices = list(zip(rotated, values, curved.hessians, strict=True))
    fitted = [
        fitted_scale(weight, own.float() / VALUE_UNIT, hessian, before)
        for (weight, own, hessian), before in zip(matrices, scale, strict=True)
    ]
    scale = to_float16(torch.stack(fitted))
    decoded = torch.empty(rotated.shape, dtype=_decoded_dtype(basis.device), device=basis.device)
    sums = []
    for place, (weight, own, hessian) in enumerate(matrices):
        found = own.float() / VALUE_UNIT * scale[place].float()[:, None]
        sums.append(_row_sums(weight, found, hessian))
        decoded[place] = as_handed_on(basis.own(found))
    return _CodedRows(pack_rings(symbols, code), scale, decoded, torch.stack(sums))


def _row_sums(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """What ``proxy_error`` is made of, row by row: (rows, 4) float64."""
    difference = decoded - weight
    sums = (
        ((difference @ hessian) * difference).sum(dim=1),
        ((weight @ hessian) * weight).sum(dim=1),
        difference.square().sum(dim=1),
        weight.square().sum(dim=1),
    )
    return torch.stack(sums, dim=1).double()


def cut_apart(
    stack: Mapping[str, Tensor],
    packed: NDArray[np.int16],
    scale: NDArray[np.float16],
    decoded: Tensor,
    signs: NDArray[np.int8],
    code: TrellisCode,
    error_of: Callable[[slice], float],
) -> dict[str, EncodingResult]:
    """Cut encoded rows into the matrices that were stacked.

    Args:
        stack: name -> (out_features, in_features), whose rows follow each other in all of the following.
        packed: (rows / 16, in_features / 16, 16 K).
        scale: (rows,).
        decoded: (rows, in_features) in the model's own basis.
        signs: (in_features,) of the rotation.
        code: the trellis code.
        error_of: proxy error of a range of rows.
    """
    results, start = {}, 0
    for name, weight in stack.items():
        rows = slice(start, start + weight.shape[0])
        encoded = EncodedMatrix(
            packed=packed[rows.start // TILE_SIDE : rows.stop // TILE_SIDE],
            scale=scale[rows],
            signs=signs,
            rotation_block=rotation_block(len(signs)),
            code=code,
        )
        results[name] = EncodingResult(encoded, decoded[rows], error_of(rows))
        start = rows.stop
    return results


def _errors(sums: Tensor) -> Callable[[slice], float]:
    """``proxy_error`` of a range of rows, from ``_row_sums``."""

    def error_of(rows: slice) -> float:
        loss, power, error, square = sums[rows].sum(dim=0).tolist()
        if power <= 0:
            loss, power = error, square
        return float(loss / power) if power > 0 else 0.0

    return error_of


def _stacked(weights: Mapping[str, Tensor], rows: slice, device: torch.device) -> Tensor:
    """Rows of the matrices set on top of each other: (rows, in_features) float32."""
    parts, start = [], 0
    for weight in weights.values():
        part = weight[max(0, rows.start - start) : max(0, rows.stop - start)]
        parts.append(part.to(device).float())
        start += weight.shape[0]
    return torch.cat(parts)


def _tiles_that_fit(columns: int, memory_bytes: int) -> int:
    """Rows of tiles, at least 64: with fewer a GPU idles, and they are few bytes."""
    room = memory_bytes - _BYTES_PER_HESSIAN_ENTRY * columns**2
    return max(64, room // (_BYTES_PER_WEIGHT * columns * TILE_SIDE))


def _decoded_dtype(device: torch.device) -> torch.dtype:
    """What is still needed of decoded weights is the input of later products, which keep no more bits."""
    return torch.float32 if device.type == "cpu" else torch.float16
