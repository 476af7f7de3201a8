"""The search of the GPU in numpy: the slow truth of its arithmetic, which is float16.

A cost is ``fma(d, d, metric)`` with ``d = value - target``, every operation rounded once to float16 (nearest
even), in units of 64 values. README.md in this folder says why the GPU computes otherwise than processors do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ernieq.kernels.viterbi.reference import RENORMALISE_EVERY, trace_back
from ernieq.trellis import TILE_WEIGHTS, TrellisCode, state_values

HALF_UNIT = 64.0
HALF_LIMIT = 8.0  # just beyond the largest value, 510 / 64


def round_targets(targets: NDArray[np.float32]) -> NDArray[np.float16]:
    """Targets in value units as the search sees them: in units of 64 values, clipped to +-8, float16."""
    scaled = targets * np.float32(1 / HALF_UNIT)
    rounded: NDArray[np.float16] = np.clip(scaled, -HALF_LIMIT, HALF_LIMIT).astype(np.float16)
    return rounded


def search(
    targets: NDArray[np.float16], code: TrellisCode, start: int | None
) -> tuple[NDArray[np.float16], list[NDArray[np.uint8]]]:
    """Run add-compare-select from an even weight on, as ``reference.search`` does in integers.

    Args:
        targets: (steps,) float16 from ``round_targets``.
        code: the trellis code.
        start: the node before the first weight, or None for any.

    Returns:
        Metrics of the nodes after the last weight, float16, and for every step the dropped bits chosen at each
        node after it, uint8. Of equal candidates the one with the smallest dropped bits wins.
    """
    values = (state_values(code.state_bits).astype(np.float32) / HALF_UNIT).astype(np.float16)
    metrics = np.zeros(code.nodes_before(0), dtype=np.float16)
    if start is not None:
        metrics[:] = np.inf
        metrics[start] = 0
    choices = []
    for step, target in enumerate(targets):
        if step and step % RENORMALISE_EVERY == 0:
            metrics = metrics - metrics.min()
        inherited = np.repeat(metrics, code.symbols_at(step))  # (states,)
        difference = (values - target).astype(np.float64)
        # The square of a float16 and its sum with another are exact in float64: one rounding, as in an fma.
        candidates = (difference * difference + inherited).astype(np.float16)
        candidates = candidates.reshape(code.symbols_at(step + 1), -1)  # (dropped, node)
        choices.append(candidates.argmin(axis=0).astype(np.uint8))
        metrics = candidates.min(axis=0)
    return metrics, choices


def encode_tiles(targets: NDArray[np.float32], code: TrellisCode, first_pass_steps: int) -> NDArray[np.uint8]:
    """Tail-biting search: (tiles, 256) float32 targets in value units -> (tiles, 256) uint8 symbols.

    The first pass covers a multiple of four weights.
    """
    half = first_pass_steps // 2
    seam = np.arange(-half, half) % TILE_WEIGHTS
    symbols = np.empty(targets.shape, dtype=np.uint8)
    for tile, sequence in enumerate(round_targets(targets)):
        metrics, choices = search(sequence[seam], code, start=None)
        boundary, _ = trace_back(choices[half:], int(metrics.argmin()), code)
        _, choices = search(sequence, code, start=boundary)
        _, symbols[tile] = trace_back(choices, boundary, code)
    return symbols
