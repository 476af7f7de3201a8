"""Scales of output channels: before the search, and fitted again after it."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import NonFiniteError
from ernieq.trellis import VALUE_RMS, VALUE_UNIT

SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16: an all-zero row decodes to something below 3e-7

# Root mean square of the codebook over that of the weights with the least squared error on a Gaussian source
# (benchmarks/gaussian_tiles.py); a finer code wants to reach further into the tails.
CODEBOOK_SCALE: dict[float, float] = {
    1.5: 0.97, 2: 1.02, 2.5: 1.04, 3: 1.05, 3.5: 1.08, 4: 1.08, 4.5: 1.11, 5: 1.13, 5.5: 1.16, 6: 1.17,
    7: 1.22, 8: 1.28,
}  # fmt: skip


def to_float16(scale: Tensor) -> Tensor:
    """Round to what the file stores: fp16, never below the smallest positive number.

    Raises:
        NonFiniteError: a scale is beyond the range of fp16.
    """
    rounded = scale.clamp(min=SMALLEST_SCALE).half()
    if not torch.isfinite(rounded).all():
        raise NonFiniteError(f"a channel scale is {float(scale.max()):.3g}, beyond the range of float16")
    return rounded


def initial_scale(weight: Tensor, bits_per_weight: float) -> Tensor:
    """Scale of every row from its root mean square: (..., rows, columns) -> (..., rows) float16."""
    rms = weight.square().mean(dim=-1).sqrt()
    return to_float16(rms * (CODEBOOK_SCALE[bits_per_weight] * VALUE_UNIT / VALUE_RMS))


def refit_scale(weight: Tensor, normalised: Tensor, hessian: Tensor, before: Tensor) -> Tensor:
    """Least-squares scale of every row for the values that were chosen.

    Minimises ``(w - s q) H (w - s q)^T`` over s for each row: ``s = w H q^T / q H q^T``.

    Args:
        weight: (out_features, in_features) float32.
        normalised: the chosen values / 128, same shape.
        hessian: (in_features, in_features) float32, rotated.
        before: (out_features,) float16 scales of the search, kept where the fit makes no sense.

    Returns:
        (out_features,) float16.
    """
    return to_float16(fitted_scale(weight, normalised, hessian, before))


def fitted_scale(weight: Tensor, normalised: Tensor, hessian: Tensor, before: Tensor) -> Tensor:
    """``refit_scale`` before it is rounded: (out_features,) float32."""
    projected = normalised @ hessian
    power = (projected * normalised).sum(dim=1)
    overlap = (projected * weight).sum(dim=1)
    fitted = overlap / power.clamp(min=torch.finfo(torch.float32).tiny)
    sensible = (fitted > 0.5 * before.float()) & (fitted < 2 * before.float())
    return torch.where(sensible, fitted, before.float())
