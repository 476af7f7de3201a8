"""Feed-forward parts: the gated MLP, the router and the mixture of experts.

Shapes: N tokens, E experts, k experts per token, H hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ernieq.model.config import ModelConfig


class Mlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    @staticmethod
    def activate(gate: Tensor, up: Tensor) -> Tensor:
        """The input of ``down_proj``, from the outputs of the other two."""
        return functional.silu(gate) * up

    def forward(self, states: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        output: Tensor = self.down_proj(self.activate(self.gate_proj(states), self.up_proj(states)))
        return output


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        selected: (N, k) int64, the experts of each token.
        weights: (N, k) float32, what their outputs are multiplied by.
        probabilities: (N, E) float32, the router's softmax, without the correction bias.
    """

    selected: Tensor
    weights: Tensor
    probabilities: Tensor


def choose_experts(logits: Tensor, bias: Tensor, choices: int, norm_min: float) -> Routing:
    """Choose experts by the logits of the router.

    The correction bias balances the load: it takes part in the choice and never enters the weights.

    Args:
        logits: (N, E) float32.
        bias: (E,) or (1, E) float32.
        choices: k.
        norm_min: least sum that the weights are divided by.
    """
    probabilities = logits.softmax(dim=-1)
    selected = (probabilities + bias).topk(choices, dim=-1).indices
    chosen = probabilities.gather(-1, selected)
    weights = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)
    return Routing(selected, weights, probabilities)


class Experts(nn.ModuleList):
    """The routed experts; ``experts[e]`` is an ``Mlp`` without biases."""

    def __init__(self, config: ModelConfig) -> None:
        width = config.moe_intermediate_size
        super().__init__(Mlp(config.hidden_size, width, bias=False) for _ in range(config.moe_num_experts))

    def forward(self, states: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the selected experts.

        Each expert runs once over its own tokens. The sum of a token is formed in the order of expert
        numbers, in float32, so that it does not depend on the other tokens of the batch.

        Args:
            states: (N, H).
            routing: of the same N tokens.

        Returns:
            (N, H) in the dtype of ``states``.
        """
        total = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
        choices = routing.selected.shape[1]
        order = routing.selected.flatten().argsort(stable=True)  # (N k,) places in `selected`, expert by expert
        weights = routing.weights.flatten()
        counts = routing.selected.flatten().bincount(minlength=len(self)).tolist()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                places = order[start : start + count]
                tokens = places // choices
                output = self[expert](states.index_select(0, tokens)) * weights[places, None]
                total.index_add_(0, tokens, output.float())
                start += count
        return total.to(states.dtype)


class Router(nn.Linear):
    """The router's matrix; it multiplies in float32 whatever the dtype of the model is."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.moe_num_experts, bias=False, dtype=torch.float32)

    def forward(self, states: Tensor) -> Tensor:
        """(N, H) to (N, E) float32 logits."""
        return functional.linear(states.float(), self.weight.float())


class RouterStatics(nn.Module):
    """Holds the correction bias under the name that checkpoints give it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = torch.zeros(1, config.moe_num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)


class SparseMlp(nn.Module):
    """Routed experts, and the shared experts (fused as one MLP) that see every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._choices = config.moe_k
        self._norm_min = config.moe_norm_min
        self.gate = Router(config)
        self.moe_statics = RouterStatics(config)
        self.experts: Any = Experts(config)  # any module with the same call may take its place
        shared = config.moe_intermediate_size * config.moe_num_shared_experts
        self.shared_experts = Mlp(config.hidden_size, shared, bias=config.use_bias) if shared else None

    def route(self, states: Tensor) -> Routing:
        """Choose experts for (N, H)."""
        bias = self.moe_statics.e_score_correction_bias.float()
        return choose_experts(self.gate(states), bias, self._choices, self._norm_min)

    def forward(self, states: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        flat = states.reshape(-1, states.shape[-1])  # (N, H)
        output: Tensor = self.experts(flat, self.route(flat))
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view(states.shape)
