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
    # A state is the last L bits up to a weight's own symbol. Runs of symbols are doubled until they have L.
    states, held = symbols.to(torch.int32), 1
    while held * code.bits_per_weight < code.state_bits:
        states = states | (states.roll(held, dims=-1) << (held * code.bits_per_weight))
        held *= 2
    states &= code.states - 1
    table = _values(code.state_bits, symbols.device)
    return table.index_select(0, states.flatten()).view(symbols.shape)


def pack_rings(symbols: Tensor, code: TrellisCode) -> Tensor:
    """Pack symbols into units as ``pack_symbols`` does: (..., 256) uint8 -> (..., 16 K) int16."""
    bits = code.bits_per_weight
    runs = symbols.unflatten(-1, (-1, _UNIT_BITS)).to(torch.int32)  # 16 symbols fill K units exactly
    units = []
    for unit in range(bits):
        word = torch.zeros(runs.shape[:-1], dtype=torch.int32, device=symbols.device)
        first, end = _UNIT_BITS * unit, _UNIT_BITS * (unit + 1)
        for place in range(first // bits, -(-end // bits)):
            shift = end - bits * (place + 1)
            symbol = runs[..., place]
            word |= symbol << shift if shift >= 0 else symbol >> -shift
        units.append(word & 0xFFFF)
    packed = torch.stack(units, dim=-1).flatten(-2)  # (..., 16 K), unsigned
    return ((packed ^ 0x8000) - 0x8000).to(torch.int16)


@lru_cache(maxsize=4)
def _order(device: torch.device) -> tuple[Tensor, Tensor]:
    """Row-major position of each weight of the sequence, and the inverse, both (256,) int64."""
    order = np.array(tile_order())
    return torch.from_numpy(order).to(device), torch.from_numpy(np.argsort(order)).to(device)


@lru_cache(maxsize=16)
def _values(state_bits: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(state_values(state_bits))).to(device)
