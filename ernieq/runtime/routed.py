"""The routed experts of a prompt: its rows sorted by expert, each expert over its own rows.

Shapes: N tokens, E experts, k experts per token, P = N k pairs of a token and an expert, H hidden width, I
inner width of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ernieq.kernels.token_step import cuda as token_step
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.runtime.plan import RoutedPlan
from ernieq.runtime.products import activate


class Order(NamedTuple):
    """Pairs sorted by expert.

    Attributes:
        tokens: (P,) int64, the token of each sorted pair.
        places: (N, k) int64, where each token's pairs went.
        offsets: (E + 1,) int64, where each expert's pairs begin.
    """

    tokens: Tensor
    places: Tensor
    offsets: Tensor


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
    selected, weights = route(normed, routed, choices, norm_min)
    order = sort_pairs(selected, routed.experts)
    token_step.add_gathered(hidden, _run_sorted(rotated, routed, order), order.places, weights)


def route(normed: Tensor, routed: RoutedPlan, choices: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """Choose experts: (N, H) float32 -> numbers (N, k) int64 and weights (N, k) float32.

    As the model's ``SparseMlp.route``: the correction bias takes part in the choice only.
    """
    probabilities = torch.mm(normed, routed.router.T).softmax(dim=-1)  # (N, E)
    selected = (probabilities + routed.bias).topk(choices, dim=-1).indices
    chosen = probabilities.gather(-1, selected)
    return selected, chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)


def sort_pairs(selected: Tensor, experts: int) -> Order:
    """Sort pairs by expert, those of one expert by token: (N, k) int64. Nothing waits for the host."""
    flat = selected.flatten()
    in_order, order = flat.sort(stable=True)  # (P,)
    numbers = torch.arange(max(flat.numel(), experts + 1), device=flat.device)
    places = torch.empty_like(order).scatter_(0, order, numbers[: flat.numel()])
    offsets = torch.searchsorted(in_order, numbers[: experts + 1])
    tokens = torch.div(order, selected.shape[1], rounding_mode="floor")
    return Order(tokens, places.view(selected.shape), offsets)


def _run_sorted(rotated: Rotated, routed: RoutedPlan, order: Order) -> Tensor:
    """Outputs of sorted pairs: (P, H) float32; tiles are decoded in registers, nothing waits for the host."""
    offsets = order.offsets.to(torch.int32)
    up, down = routed.gate_up, routed.down
    x, scale = (part.index_select(0, order.tokens) for part in rotated)
    inner = matmul.multiply_grouped(x, scale, up.words, up.scale, up.code, offsets)
    del x
    activated = activate(inner, down.rotation)
    del inner
    return matmul.multiply_grouped(*activated, down.words, down.scale, down.code, offsets)
