"""Which tokens sensitivities are measured on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ernieq.calibrate import CalibrationSample

# Many short windows tell more than a few long ones: sensitivities differ from text to text.
_SCORED_LENGTH = 256
_SEEN_WINDOWS = 16
_SCORED_WINDOWS, _SCORED_WINDOWS_OF_LARGE, _LARGE = 32, 16, 4_000_000_000
_MIN_SHARED = 2  # windows below which scored and seen ones are the same



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


def probe_of(sample: CalibrationSample, parameters: int) -> Probe:
    """Windows of a measurement, spread over the calibration sample: some scored, others for the Hessians."""
    windows, length = sample.windows.shape
    wanted = _SCORED_WINDOWS_OF_LARGE if parameters > _LARGE else _SCORED_WINDOWS
    if windows <= _MIN_SHARED:
        return Probe(sample.windows[:, :_SCORED_LENGTH], sample.windows)
    scored = _spread(windows, min(wanted, windows // 2))
    rest = sorted(set(range(windows)) - set(scored))
    seen = [rest[place] for place in _spread(len(rest), min(_SEEN_WINDOWS, len(rest)))]
    return Probe(sample.windows[scored, : min(_SCORED_LENGTH, length)], sample.windows[seen])


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``count``, evenly spread."""
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
