"""Tiles and rings as torch tensors: what ``ernieq.trellis`` does in numpy, on whichever device holds them.

The encoder of a GPU stays there from the weights to the packed rings; ``ernieq.trellis`` is the truth.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ernieq.trellis import TILE_WEIGHTS, TrellisCode, state_values, tile_order

_UNIT_BITS = 16


def block_to_tiles(block: Tensor) -> Tensor:
    """Cut one block of columns into tiles: (..., rows, 16) -> (tiles, 256) in sequence order."""
    flat = block.reshape(-1, TILE_WEIGHTS)
    return flat.index_select(1, _order(block.device)[0])


def tiles_to_block(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of ``block_to_tiles``; ``shape`` is that of the block, (..., rows, 16)."""
    return tiles.index_select(1, _order(tiles.device)[1]).reshape(shape)


def symbol_values(symbols: Tensor, code: TrellisCode) -> Tensor:
    """Codebook value of every weight of whole rings: (tiles, 256) uint8 -> (tiles, 256) int16."""
    even_shift, odd_shift = code.shifts
    even, odd = symbols.to(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)  # (tiles, 128)
    # The state of an odd weight is the last L bits of the pairs up to its own. Runs of pairs are doubled until
    # they have L. The state of an even weight is that of the odd one before it, shifted on.
    after, held = even << odd_shift | odd, 1
    while held * code.pair_bits < code.state_bits:
        after = after | (after.roll(held, dims=-1) << (held * code.pair_bits))
        held *= 2
    after &= code.states - 1
    within = (after.roll(1, dims=-1) << even_shift | even) & (code.states - 1)
    states = torch.stack((within, after), dim=-1)  # (tiles, 128, 2)
    table = _values(code.state_bits, symbols.device)
    return table.index_select(0, states.flatten()).view(symbols.shape)


def pack_rings(symbols: Tensor, code: TrellisCode) -> Tensor:
    """Pack symbols into units as ``pack_symbols`` does: (..., 256) uint8 -> (..., 16 K) int16."""
    runs = symbols.unflatten(-1, (-1, 2 * _UNIT_BITS)).to(torch.int32)  # 32 symbols fill 2 K units exactly
    words = [torch.zeros_like(runs[..., 0]) for _ in range(code.pair_bits)]
    end = 0
    for place in range(2 * _UNIT_BITS):
        first, end = end, end + code.shifts[place % 2]
        for unit in range(first // _UNIT_BITS, -(-end // _UNIT_BITS)):
            left = _UNIT_BITS * (unit + 1) - end
            words[unit] |= runs[..., place] << left if left >= 0 else runs[..., place] >> -left
    packed = torch.stack(words, dim=-1).flatten(-2) & 0xFFFF  # (..., 16 K), unsigned
    return ((packed ^ 0x8000) - 0x8000).to(torch.int16)


@lru_cache(maxsize=4)
def _order(device: torch.device) -> tuple[Tensor, Tensor]:
    """Row-major position of each weight of the sequence, and the inverse, both (256,) int64."""
    order = np.array(tile_order())
    return torch.from_numpy(order).to(device), torch.from_numpy(np.argsort(order)).to(device)


@lru_cache(maxsize=16)
def _values(state_bits: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(state_values(state_bits))).to(device)
