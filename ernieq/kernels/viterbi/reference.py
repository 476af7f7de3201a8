"""The Viterbi search in numpy: the slow truth, equal bit for bit to every compiled path.

Every quantity is an integer of at most 16 bits with saturation, as README.md in this folder derives, so that no
processor, compiler or thread count can change a choice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernieq.trellis import TILE_WEIGHTS, TrellisCode, state_values

TARGET_UNIT = 32
TARGET_LIMIT = 16383
RENORMALISE_EVERY = 16
UNREACHABLE = 32767


def doublings(code: TrellisCode) -> int:
    """How often a difference is doubled before it is squared: finer costs where the code is finer."""
    bits = code.shifts[0]
    return max(bits - 2, 0) if bits < 6 else bits - 3


def branch_costs(target: int, code: TrellisCode) -> NDArray[np.int32]:
    """Cost of each state at a weight: (2^L,) int32, 0 to 32768, in 2^(5 - 2 doublings) squared value units."""
    difference = state_values(code.state_bits).astype(np.int32) * TARGET_UNIT - target
    for _ in range(doublings(code)):
        difference = np.clip(2 * difference, -32768, 32767)
    return (difference * difference + (1 << 14)) >> 15


def search(
    targets: NDArray[np.int16], code: TrellisCode, start: int | None
) -> tuple[NDArray[np.int32], list[NDArray[np.uint8]]]:
    """Run add-compare-select over a sequence that starts at an even weight.

    Args:
        targets: (steps,) int16, in 1/32 of a value unit, within +-16383.
        code: the trellis code.
        start: the node before the first weight, or None for any.

    Returns:
        Metrics of the nodes after the last weight, int32, and for every step the dropped bits chosen at each
        node after it, uint8 (as many as ``nodes_before`` the next weight). Of equal candidates the one with the
        smallest dropped bits wins.
    """
    metrics = np.zeros(code.nodes_before(0), dtype=np.int32)
    if start is not None:
        metrics[:] = UNREACHABLE
        metrics[start] = 0
    choices = []
    for step, target in enumerate(targets):
        if step and step % RENORMALISE_EVERY == 0:
            metrics -= metrics.min()
        inherited = np.repeat(metrics, code.symbols_at(step))  # (states,)
        candidates = (inherited + branch_costs(int(target), code)).reshape(code.symbols_at(step + 1), -1)
        choices.append(candidates.argmin(axis=0).astype(np.uint8))  # (dropped, node) -> (node,)
        metrics = np.minimum(candidates.min(axis=0), UNREACHABLE)
    return metrics, choices


def trace_back(choices: list[NDArray[np.uint8]], node: int, code: TrellisCode) -> tuple[int, NDArray[np.uint8]]:
    """Follow the choices back from the last node.

    Args:
        choices: of ``search``, the first of an even weight.
        node: the node after the last weight.
        code: the trellis code.

    Returns:
        The node before the first weight and the symbols passed, (steps,) uint8.
    """
    symbols = np.empty(len(choices), dtype=np.uint8)
    for step in range(len(choices) - 1, -1, -1):
        state = node + int(choices[step][node]) * code.nodes_before(step + 1)
        symbols[step] = state % code.symbols_at(step)
        node = state // code.symbols_at(step)
    return node, symbols


def encode_tiles(targets: NDArray[np.int16], code: TrellisCode, first_pass_steps: int) -> NDArray[np.uint8]:
    """Tail-biting search: (tiles, 256) int16 targets -> (tiles, 256) uint8 symbols.

    A first pass over the weights around the seam finds the node there; the second starts and ends in it. The
    first pass covers a multiple of four weights, so that both start at an even one.
    """
    half = first_pass_steps // 2
    seam = np.arange(-half, half) % TILE_WEIGHTS
    symbols = np.empty(targets.shape, dtype=np.uint8)
    for tile, sequence in enumerate(targets):
        metrics, choices = search(sequence[seam], code, start=None)
        boundary, _ = trace_back(choices[half:], int(metrics.argmin()), code)
        _, choices = search(sequence, code, start=boundary)
        _, symbols[tile] = trace_back(choices, boundary, code)
    return symbols
