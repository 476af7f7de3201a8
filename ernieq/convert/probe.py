"""Which tokens sensitivities are measured on, and how the windows of a measurement are put together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ernieq.calibrate import CalibrationSample

# Many short windows tell more than a few long ones: sensitivities differ from text to text.
_SCORED_WINDOWS, _SCORED_LENGTH = 16, 256
_SEEN_WINDOWS = 16


@dataclass(frozen=True)
class Probe:
    """Tokens of a measurement.

    Args:
        scored: (windows, length) int64, whose logits are compared.
        seen: (windows, length) int64, which the Hessians come from. Others than the scored ones: errors that
            were shaped by a Hessian of the very tokens that they are measured on would look too small.
    """

    scored: Tensor
    seen: Tensor


def probe_of(sample: CalibrationSample) -> Probe:
    """Windows of a measurement, spread over the calibration sample; a single one is both scored and seen."""
    windows = sample.windows
    count = windows.shape[0]
    if count == 1:
        return Probe(windows[:, :_SCORED_LENGTH], windows)
    scored = _spread(count, min(_SCORED_WINDOWS, count // 2))
    rest = sorted(set(range(count)) - set(scored))
    seen = [rest[place] for place in _spread(len(rest), min(_SEEN_WINDOWS, len(rest)))]
    return Probe(windows[scored, :_SCORED_LENGTH], windows[seen])


def balanced(divergences: NDArray[np.float64]) -> NDArray[np.float64]:
    """What every unit costs, with all windows counting the same.

    Text that the model knows little of loses ten times as much as other text, and in a plain mean a few such
    windows would decide. Here each window says how its own divergence divides among the units.

    Args:
        divergences: (units, windows) nats.

    Returns:
        (units,) nats; their sum is the sum of the plain means.
    """
    positive = divergences.clip(min=0.0)
    totals = positive.sum(axis=0)  # (windows,)
    shares = (positive / np.where(totals > 0, totals, 1.0)).sum(axis=1)
    result: NDArray[np.float64] = shares * (totals.mean() / max(shares.sum(), np.finfo(np.float64).tiny))
    return result


def typical_divergence(divergences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Geometric mean over windows, all of which count the same: (candidates, windows) to (candidates,)."""
    result: NDArray[np.float64] = np.exp(np.log(divergences.clip(min=1e-30)).mean(axis=1))
    return result


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``count``, evenly spread."""
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
