"""Decode encoded matrices to the very numbers that the encoder handed on with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ernieq.encode.batch_matrix import as_handed_on, row_batches
from ernieq.encode.curvature import Basis
from ernieq.encode.options import EncodeOptions
from ernieq.kernels.trellis_matmul import decode
from ernieq.trellis import TILE_SIDE, EncodedMatrix, TrellisCode


def decode_stack(
    matrices: Mapping[str, EncodedMatrix],
    worker: torch.device,
    home: torch.device,
    options: EncodeOptions,
    *,
    alone: bool,
) -> dict[str, Tensor]:
    """What ``encode_matrices``, or ``encode_batch`` if not ``alone``, returned as ``decoded``, bit by bit.

    The matrices go through the same products in the same shapes as in the encoder: they must be those of one
    stack, in its order.

    Args:
        matrices: name -> encoded matrix.
        worker: the device that encodes.
        home: the device that the decoded weights are wanted on.
        options: those of the encoder.
        alone: whether the stack was encoded on its own.

    Returns:
        name -> (out_features, in_features) in the model's own basis.
    """
    first, heights = next(iter(matrices.values())), [matrix.out_features for matrix in matrices.values()]
    basis, total = Basis(first.signs, worker), sum(heights)
    packed = torch.from_numpy(np.concatenate([matrix.packed for matrix in matrices.values()]))
    scale = torch.from_numpy(np.concatenate([matrix.scale for matrix in matrices.values()]))
    pieces: list[Tensor] = []

    def decode_rows(row_tiles: Sequence[int]) -> None:
        start, stop = row_tiles[0], row_tiles[-1] + 1
        rows = slice(start * TILE_SIDE, stop * TILE_SIDE)
        rotated = _rotated(packed[start:stop], scale[rows], first.code, worker, options.threads)
        pieces.append(as_handed_on(basis.own(rotated)).to(home))

    if worker.type == "cuda" and alone:
        row_batches(total, first.in_features, options).run(range(total // TILE_SIDE), decode_rows)
    else:
        decode_rows(range(total // TILE_SIDE))
    decoded = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return dict(zip(matrices, decoded.split(heights), strict=True))


def _rotated(
    packed: Tensor, scale: Tensor, code: TrellisCode, device: torch.device, threads: int | None
) -> Tensor:
    """Decode exactly, in the rotated basis: (rows, in_features) float32 on the device."""
    if device.type == "cpu":
        return decode(packed, scale, code, threads=threads)
    from ernieq.kernels.trellis_matmul import cuda  # needs a GPU

    words = cuda.to_words(packed.to(device)).contiguous()
    return cuda.decode(words, scale.to(device).contiguous(), code, dtype=torch.float32)
