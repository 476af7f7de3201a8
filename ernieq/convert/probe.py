"""Which tokens sensitivities are measured on."""

from __future__ import annotations

from dataclasses import dataclass

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


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``count``, evenly spread."""
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
