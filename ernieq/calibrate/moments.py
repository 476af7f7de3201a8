"""Second moments of the inputs of projections: Hessians, and what is needed to correct a target.

For a projection with input ``x`` (of the model quantized so far) the layer-wise loss is ``tr(E H E^T)`` with
``H = E[s x x^T]``; ``s`` weighs tokens. For an expert ``s`` is the squared routing weight, because its output
enters the sum multiplied by that weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernieq.kernels.precision import one_thread
from ernieq.kernels.token_sums import add_gram, add_products

# A number that a GPU may not have worked out yet: nobody waits for it before it is needed on the processor.
Scalar = float | Tensor


@dataclass
class TokenWeights:
    """How many tokens there were, and what their weights come to."""

    weight: Scalar = field(init=False, default=0.0)
    weight_squared: Scalar = field(init=False, default=0.0)
    tokens: int = field(init=False, default=0)

    def count(self, tokens: int, weights: Tensor | None = None) -> None:
        """Add so many tokens: weights (tokens,) or ones."""
        self.weight = self.weight + _total(tokens, weights)
        self.weight_squared = self.weight_squared + _total(
            tokens, None if weights is None else weights.square()
        )
        self.tokens += tokens

    @property
    def effective_tokens(self) -> Scalar:
        """Kish's effective sample size, (sum s)^2 / sum s^2."""
        if isinstance(self.weight_squared, Tensor):
            return self.weight**2 / self.weight_squared.clamp(min=torch.finfo(torch.float64).tiny)
        return self.weight**2 / self.weight_squared if self.weight_squared > 0 else 0.0


def _total(tokens: int, weights: Tensor | None) -> Scalar:
    if weights is None:
        return float(tokens)
    return weights.sum(dtype=torch.float64) if weights.is_cuda else float(weights.sum())


@dataclass
class Moments(TokenWeights):
    """Weighted sums over tokens, accumulated in float32 batches into float32 totals.

    Args:
        width: in_features of the projection.
        residual_rows: out_features of the residual sum that is kept beside it; 0 for none.
        device: where the sums are kept; the inputs must lie there.
    """

    width: int
    residual_rows: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gram: Tensor = field(init=False)
    residual: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.width, self.width, device=self.device)
        self.residual = torch.zeros(self.residual_rows, self.width, device=self.device)

    def add(self, inputs: Tensor, weights: Tensor | None = None, residuals: Tensor | None = None) -> None:
        """Add tokens: inputs (tokens, width), weights (tokens,) or ones, residuals (tokens, residual_rows)."""
        if inputs.shape[0] == 0:
            return
        weighted = inputs if weights is None else inputs * weights[:, None]
        if weights is not None and self.gram.is_cuda:
            # TF32 rounds both factors: equal ones keep the sum symmetric and without negative eigenvalues.
            root = inputs * weights.sqrt()[:, None]
            add_gram(self.gram, root, root)
        else:
            add_gram(self.gram, weighted, inputs)
        if residuals is not None:
            add_products(self.residual, residuals, weighted)
        self.count(inputs.shape[0], weights)

    def mean_gram(self) -> Tensor:
        """H: (width, width), the weighted mean of x x^T; zeros without tokens."""
        return self.gram / self._divisor()

    def mean_residual(self) -> Tensor:
        """(residual_rows, width), the weighted mean of r x^T; zeros without tokens."""
        return self.residual / self._divisor()

    def _divisor(self) -> Scalar:
        if isinstance(self.weight, Tensor):
            return torch.where(self.weight > 0, self.weight, 1.0)
        return self.weight or 1.0


def shrinkage(effective_tokens: Scalar, width: int, strength: float) -> Scalar:
    """Trust in an expert's own Hessian: n / (n + strength * width), 0 to 1."""
    return effective_tokens / (effective_tokens + strength * width)


def shrunk_gram(own: Moments, prior: Tensor, strength: float) -> Tensor:
    """Pull an expert's Hessian toward that of its layer.

    Args:
        own: moments over the tokens routed to the expert.
        prior: (width, width) mean x x^T over tokens of the whole layer.
        strength: tokens per channel at which own and prior count the same.

    Returns:
        (width, width) float32; the prior itself for an expert that saw no token, never the identity.
    """
    trust = shrinkage(own.effective_tokens, own.width, strength)
    gram: Tensor = trust * own.mean_gram() + (1 - trust) * prior
    return gram


def corrected_weight(weight: Tensor, gram: Tensor, residual: Tensor, damping: float) -> Tensor:
    """Move a weight so that the quantized prefix is led back to the output of the bf16 model.

    The residual of a token is the output that is wanted minus ``W x``. The least-squares change of W is
    ``E[r x^T] (H + damping)^-1``; the damping keeps directions that calibration hardly saw where they are.

    Args:
        weight: (out_features, in_features) float32.
        gram: (in_features, in_features), mean x x^T.
        residual: (out_features, in_features), mean r x^T.
        damping: share of the mean diagonal of H that is added to it.

    Returns:
        (out_features, in_features) float32.
    """
    ridge = gram.double()
    mean = ridge.diagonal().mean()
    ridge.diagonal().add_(damping * mean)
    # solve_ex does not look whether it succeeded, for which a GPU would have to be waited for. With any damping
    # it fails for a Hessian of zeros alone, which corrects nothing.
    with one_thread(ridge.device):
        change: Tensor = torch.linalg.solve_ex(ridge, residual.double().T).result.T
    return weight + torch.where(mean > 0, change, 0.0).float()
