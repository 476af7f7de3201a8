"""The routed experts of a prompt: its rows sorted by expert, each expert over its own rows.

Shapes: N tokens, E experts, k experts per token, P = N k pairs of a token and an expert, H hidden width, I
inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ernieq.kernels.token_step import cuda as token_step
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.runtime.plan import RoutedPlan
from ernieq.runtime.products import INNER_NUMBERS, DecodingBuffer, activate, expert_weights

# Up to this many rows per expert on average, the grouped kernel decodes as it multiplies; beyond it, decoding
# to float16 and torch's products are faster.
_GROUPED_ROWS = 48


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
    buffer: DecodingBuffer,
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
        buffer: where weights are decoded to.
    """
    selected, weights = route(normed, routed, choices, norm_min)
    order = sort_pairs(selected, routed.experts)
    if order.tokens.shape[0] <= _GROUPED_ROWS * routed.experts:
        out = _run_grouped(rotated, routed, order)
        factors = weights
    else:
        out, out_scale = _run_decoded(rotated, routed, order, buffer)
        factors = weights * out_scale[order.places]
    token_step.add_gathered(hidden, out, order.places, factors)


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


def _run_grouped(rotated: Rotated, routed: RoutedPlan, order: Order) -> Tensor:
    """Outputs of sorted pairs: (P, H) float32; tiles are decoded in registers."""
    offsets = order.offsets.to(torch.int32)
    up, down = routed.gate_up, routed.down
    x, scale = (part.index_select(0, order.tokens) for part in rotated)
    inner = matmul.multiply_grouped(x, scale, up.words, up.scale, up.code, offsets)
    activated = activate(inner, down.rotation)
    return matmul.multiply_grouped(*activated, down.words, down.scale, down.code, offsets)


def _run_decoded(
    rotated: Rotated, routed: RoutedPlan, order: Order, buffer: DecodingBuffer
) -> tuple[Tensor, Tensor]:
    """Outputs of sorted pairs: (P, H) float16, to be multiplied by (P,) float32.

    Some experts at a time are decoded; the first of them before the host learns how many rows each has.
    """
    pairs, device = order.tokens.shape[0], order.tokens.device
    out = torch.empty(pairs, routed.down.rows, dtype=torch.float16, device=device)
    out_scale = torch.empty(pairs, device=device)
    at_a_time = max(buffer.weights // expert_weights(routed), 1)
    rows_at_a_time = max(INNER_NUMBERS // routed.gate_up.rows, 1)
    starts: list[int] = []
    for first in range(0, routed.experts, at_a_time):
        experts = range(first, min(first + at_a_time, routed.experts))
        gate_up, down = _decode_experts(routed, experts, buffer)
        starts = starts or order.offsets.tolist()  # the one time that a layer waits for the GPU
        ends = order.offsets[experts.start + 1 : experts.stop + 1]
        for start, stop in _blocks(starts[experts.start], starts[experts.stop], rows_at_a_time):
            tokens = order.tokens[start:stop]
            relative = (ends - start).clamp(0, stop - start).to(torch.int32)
            inner = grouped_mm(rotated.x.index_select(0, tokens), gate_up.transpose(1, 2), offs=relative)
            activated = activate(inner, routed.down.rotation, rotated.scale.index_select(0, tokens))
            out[start:stop] = grouped_mm(activated.x, down.transpose(1, 2), offs=relative)
            out_scale[start:stop] = activated.scale
    return out, out_scale


def _decode_experts(routed: RoutedPlan, experts: range, buffer: DecodingBuffer) -> tuple[Tensor, Tensor]:
    """Weights of some experts: (n, 2 I, H) and (n, H, I) float16, side by side in the buffer."""
    decoded = []
    used = 0
    for stack in (routed.gate_up, routed.down):
        some = slice(experts.start, experts.stop)
        out = buffer.view(used, len(experts), stack.rows, stack.columns)
        matmul.decode(
            stack.words[some].flatten(0, 1), stack.scale[some].flatten(), stack.code, out=out.flatten(0, 1)
        )
        decoded.append(out)
        used += out.numel()
    return decoded[0], decoded[1]


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
