"""The row scales of all quantized matrices of a model, as one vector that learns.

A step rounds and updates all of them at once; products see slices of the rounded vector, whose gradients are
slices of another. A scale on its own would cost a GPU some ten launches a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ernieq.encode.scales import SMALLEST_SCALE


class ScaleBank:
    """Scales of rows, learnt as the logarithms of their changes.

    What products see is rounded as the file stores it; gradients pass through the rounding unchanged
    (straight-through, arXiv 1308.3432).

    Args:
        stored: module name -> (out_features,) float16, what the encoder found.
        blocks: the names in the order in which they lie in the vector; those of one block are read together.
        device: where they learn.

    Attributes:
        change: (rows of all matrices,) float32, the logarithm of each scale's change; zero at first.
    """

    def __init__(
        self, stored: Mapping[str, NDArray[np.float16]], blocks: Sequence[Sequence[str]], device: torch.device
    ) -> None:
        names = [name for block in blocks for name in block]
        assert sorted(names) == sorted(stored)
        flat = np.concatenate([stored[name].astype(np.float32) for name in names])
        self._stored = torch.from_numpy(flat).to(device)
        self._scale, self._gradient = self._stored.clone(), torch.zeros_like(self._stored)
        self.change = nn.Parameter(torch.zeros_like(self._stored))
        self._places: dict[str, slice] = {}
        start = 0
        for name in names:
            self._places[name] = slice(start, start + len(stored[name]))
            start += len(stored[name])

    def leaf(self, block: Sequence[str]) -> Tensor:
        """Rounded scales of a block of matrices, (rows of all of them,) float32, as of the last ``refresh``.

        Its gradients come together until ``collect``.
        """
        where = slice(self._places[block[0]].start, self._places[block[-1]].stop)
        leaf = self._scale[where].detach().requires_grad_()
        leaf.grad = self._gradient[where]
        return leaf

    @torch.no_grad()
    def refresh(self) -> None:
        """Let products see the changes: positive numbers of float16 as long as the changes are numbers."""
        self._scale.copy_(self._exact().half())

    @torch.no_grad()
    def collect(self) -> None:
        """Make the gradient of ``change`` from that of the scales, which begins anew."""
        self.change.grad = self._gradient * self._exact()  # of s exp(c) by c
        self._gradient.zero_()

    def rounded(self, name: str) -> NDArray[np.float16]:
        """What the file stores, (out_features,)."""
        scale: NDArray[np.float16] = self._scale[self._places[name]].half().cpu().numpy()
        return scale

    def _exact(self) -> Tensor:
        largest = torch.finfo(torch.float16).max
        return (self._stored * self.change.detach().exp()).clamp(SMALLEST_SCALE, largest)
