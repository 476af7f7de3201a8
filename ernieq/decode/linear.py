"""A linear layer whose weight stays in the trellis code."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from ernieq.decode.weight import TrellisWeight
from ernieq.kernels import Backend
from ernieq.trellis import EncodedMatrix


class TrellisLinear(TrellisWeight):
    """``y = W x + bias`` in place of ``nn.Linear``; computes in float32 and returns the dtype of its input.

    Args:
        matrix: the encoded weight.
        bias: (out_features,), or None.
        backend: implementation of the kernels.
        threads: threads of the kernels; all processors by default.
    """

    def __init__(
        self,
        matrix: EncodedMatrix,
        bias: Tensor | None = None,
        *,
        backend: Backend = Backend.AUTO,
        threads: int | None = None,
    ) -> None:
        super().__init__(matrix, backend=backend, threads=threads)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_encoded(
        cls,
        matrix: EncodedMatrix,
        bias: Tensor | None = None,
        *,
        backend: Backend = Backend.AUTO,
        threads: int | None = None,
    ) -> Self:
        """Build from an encoded matrix without copying its packed tiles; arguments as of the class."""
        return cls(matrix, bias, backend=backend, threads=threads)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) of the same dtype."""
        return self._with_bias(self.multiply(x)).to(x.dtype)

    def forward_rotated(self, x_rotated: Tensor) -> Tensor:
        """As ``forward``, for inputs that are rotated already: float32 -> float32."""
        return self._with_bias(self.multiply_rotated(x_rotated))

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.float()
