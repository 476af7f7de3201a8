"""The routed experts of a prompt: its rows sorted by expert, each expert over its own rows.

Shapes: N tokens, E experts, k experts per token, P = N k pairs of a token and an expert, H hidden width, I
inner width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.decode.stack import by_expert
from ernieq.kernels.token_step import cuda as token_step
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.model.mlp import choose_experts
from ernieq.runtime.plan import RoutedPlan
from ernieq.runtime.products import activate


def add_routed(
    hidden: Tensor, normed: Tensor, rotated: Rotated, routed: RoutedPlan, choices: int, norm_min: float,
) -> None:  # fmt: skip
    """Add the weighted experts to the residual stream.

    A token's experts are added in the order of their probabilities, by gathering: no sum depends on the order
    in which the GPU happens to work.

    Args:
        hidden: (N, H) float32, changed.
        normed: (N, H) float32, what the router reads.
        rotated: the same rotated, what the experts read.
        routed: router and experts.
        choices: k.
        norm_min: least sum that weights are divided by.
    """
    logits = torch.mm(normed, routed.router.T)
    routing = choose_experts(logits, routed.bias, choices, norm_min)
    order, offsets = by_expert(routing.selected, routed.experts)
    places = torch.empty_like(order)  # where each token's pairs went
    places[order] = torch.arange(order.numel(), device=order.device)
    tokens = torch.div(order, choices, rounding_mode="floor")
    outputs = _run_sorted(rotated, routed, tokens, offsets)
    token_step.add_gathered(hidden, outputs, places.view(-1, choices), routing.weights)


def _run_sorted(rotated: Rotated, routed: RoutedPlan, tokens: Tensor, offsets: Tensor) -> Tensor:
    """Outputs of sorted pairs: (P, H) float32; tiles are decoded in registers, nothing waits for the host.

    Args:
        rotated: inputs of all tokens.
        routed: the experts.
        tokens: (P,) int64, the token of each pair.
        offsets: (E + 1,) int32, where each expert's pairs begin.
    """
    up, down = routed.gate_up, routed.down
    x, scale = (part.index_select(0, tokens) for part in rotated)
    inner = matmul.multiply_grouped(x, scale, up.words, up.scale, up.code, offsets)
    del x
    activated = activate(inner, down.rotation)
    del inner
    return matmul.multiply_grouped(*activated, down.words, down.scale, down.code, offsets)
