"""In which order the inputs of WINT2 matrices are stored, told by the weights themselves.

FastDeploy's first kernel read inputs in their natural order; a later one wants them reordered inside every 64,
and that is done before weights are quantized, so nothing in a file says which it is. But the scale of the norm
before a matrix and the size of the matrix's columns belong to the same input channels, and in a trained model
they go together: on ernieq-nano and ernieq-mini the correlation of their logarithms within 64 channels is 0.3
to 0.8 in the right order and below 0.08 in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from ernieq.checkpoint.wint2 import GROUP, natural_inputs
from ernieq.errors import CheckpointError

# The better order must win by this many standard errors of a correlation of independent numbers.
_NEEDED_ERRORS = 5
_SMALLEST = 1e-30


class InputOrder(StrEnum):
    """Order of the inputs inside every 64."""

    PLAIN = "plain"
    KERNEL = "kernel"


def told_by_channels(layers: Sequence[tuple[Tensor, Tensor]], what: str) -> InputOrder:
    """The order in which columns and norms agree.

    Args:
        layers: for each layer compared, the mean square of the stored columns and the scale of the norm before
            the matrix, both (in_features,).
        what: how an error calls the checkpoint.

    Raises:
        CheckpointError: neither order agrees clearly better.
    """
    agreements = {InputOrder.PLAIN: 0.0, InputOrder.KERNEL: 0.0}
    channels = 0
    for power, norm in layers:
        columns, scales = _centred(power), _centred(norm.abs())
        channels += len(power)
        agreements[InputOrder.PLAIN] += _correlation(columns, scales) / len(layers)
        agreements[InputOrder.KERNEL] += _correlation(columns[natural_inputs(len(power))], scales) / len(layers)
    best, other = sorted(agreements, key=lambda order: abs(agreements[order]), reverse=True)
    margin = abs(agreements[best]) - abs(agreements[other])
    if not channels or margin * channels**0.5 < _NEEDED_ERRORS:
        plain, kernel = agreements[InputOrder.PLAIN], agreements[InputOrder.KERNEL]
        raise CheckpointError(
            f"the order of the inputs in {what} can't be told from its weights (agreement with the norms: "
            f"plain {plain:.2f}, kernel {kernel:.2f}); say --input-order plain or kernel"
        )
    return best


def _centred(sizes: Tensor) -> Tensor:
    """Logarithms, less the mean of each 64: only what a reordering inside them can change."""
    logarithms = sizes.double().clamp_min(_SMALLEST).log().view(-1, GROUP)
    return (logarithms - logarithms.mean(dim=1, keepdim=True)).flatten()


def _correlation(first: Tensor, second: Tensor) -> float:
    scale = first.norm() * second.norm()
    return float((first * second).sum() / scale) if torch.is_nonzero(scale) else 0.0
