"""Modules of a quantized model in which something learns, or whose gradients need something special."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as checkpoint_gradient

from ernieq.kernels.precision import float32_products
from ernieq.model import RmsNorm


class ScaledLinear(nn.Module):
    """Products with a quantized matrix.

    Args:
        values: (out_features, in_features), the decoded matrix with all scales 1; products have its dtype.
        scale: (out_features,) float32, of its rows.
        bias: (out_features,), or None.
    """

    def __init__(self, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._values, self._bias, self._scale = values, bias, scale

    def forward(self, states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        products = functional.linear(states.to(self._values.dtype), self._values)
        output: Tensor = products.to(states.dtype) * self._scale
        return output if self._bias is None else output + self._bias


class ScaledEmbedding(nn.Module):
    """Rows of a quantized table, by number.

    Args:
        values: (vocabulary, width), the decoded table with all scales 1.
        scale: (vocabulary,) float32, of its rows.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self._values, self._scale = values, scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """(...) int64 to (..., width)."""
        scales = functional.embedding(token_ids, self._scale[:, None])  # (..., 1)
        return functional.embedding(token_ids, self._values).float() * scales


class LearntWeight(nn.Module):
    """A weight that is not quantized, and learns in units of its own root mean square.

    Args:
        source: float32, as in the source.
        stored: dtype in which the source stores it.
    """

    def __init__(self, source: Tensor, stored: torch.dtype) -> None:
        super().__init__()
        self._source, self._step, self._stored = source, source.square().mean().sqrt(), stored
        self.change = nn.Parameter(torch.zeros_like(source))

    def forward(self) -> Tensor:
        """The weight, float32, each a number of the source's dtype; gradients pass through the rounding."""
        exact = self._source + self._step * self.change
        return exact + (exact.to(self._stored).to(exact.dtype) - exact).detach()

    def rounded(self) -> Tensor:
        """What the file stores, in the source's dtype, on the processor."""
        weight: Tensor = self().detach().to(self._stored).cpu()
        return weight


class TunableNorm(nn.Module):
    """A norm whose weight learns.

    Args:
        weight: (width,).
        eps: of the model.
    """

    def __init__(self, weight: LearntWeight, eps: float) -> None:
        super().__init__()
        with weight.change.device:
            self._unit = RmsNorm(weight.change.numel(), eps).requires_grad_(False)
        self._weight = weight

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to the same."""
        output: Tensor = self._weight() * self._unit(states)
        return output


class TunableRouter(nn.Module):
    """A router that learns; it keeps all bits of its products, as a rounding must not choose another expert.

    Args:
        weight: (experts, hidden_size).
    """

    def __init__(self, weight: LearntWeight) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, states: Tensor) -> Tensor:
        """(N, H) to (N, E) float32 logits."""
        with float32_products(states.device, tensor_cores=False):
            return functional.linear(states.float(), self._weight())


class Recomputed(nn.Module):
    """A decoder layer whose activations are computed again for the gradient, and not held until then."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], _cache: None = None) -> Tensor:
        """As the layer itself, without a cache."""
        output: Tensor = checkpoint_gradient(self._layer, hidden, rotary, use_reentrant=False)
        return output
