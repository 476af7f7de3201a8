"""All experts of a layer in one tensor per product, as the GPU's kernels want them.

Shapes: T tokens, E experts, k experts per token, H hidden width, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernieq.decode import gpu
from ernieq.decode.linear import TrellisLinear
from ernieq.trellis import TILE_SIDE, TrellisCode

# Up to this many tokens run one kernel per product over the experts that they selected.
SELECTED_TOKENS = 8

# Up to this many rows an expert, on average, are multiplied while decoding.
GROUPED_ROWS = 128


def stackable(readers: Sequence[TrellisLinear]) -> bool:
    """Whether matrices differ in their tiles and scales alone, so that one kernel can run over all of them."""
    first = readers[0]
    return all(
        (reader.code, reader.rotation_block, reader.out_features)
        == (first.code, first.rotation_block, first.out_features)
        and reader.bias is None
        and torch.equal(reader.signs, first.signs)
        for reader in readers
    )


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one shape, code and rotation, one per expert.

    Args:
        words: (E, R / 16, C / 16, 8 K) int32.
        scale: (E, R) float16.
        signs: (C,) int8.
        rotation_block: side of the Hadamard blocks of the input.
        code: the trellis code.
    """

    words: Tensor
    scale: Tensor
    signs: Tensor
    rotation_block: int
    code: TrellisCode

    def decode(self, experts: slice, out: Tensor) -> Tensor:
        """Rotated weights of some experts: (n, R, C) float16, written into ``out``, (at least n, R, C)."""
        from ernieq.kernels.trellis_matmul import cuda

        words, scale = self.words[experts].flatten(0, 1), self.scale[experts].flatten()
        out = out[: experts.stop - experts.start]
        cuda.decode(words, scale, self.code, out=out.flatten(0, 1), dtype=torch.float16)
        return out

    def buffer(self, experts: int) -> Tensor:
        """Room for the decoded weights of some experts: (n, R, C) float16."""
        shape = (experts, self.scale.shape[1], self.signs.shape[0])
        return torch.empty(shape, dtype=torch.float16, device=self.words.device)


def stack_matrices(experts: Sequence[Sequence[TrellisLinear]], device: torch.device) -> MatrixStack:
    """Move matrices to a GPU, expert by expert, into one tensor; the linears become views of it.

    The packed tiles of a linear are let go before the next is moved, so the GPU holds one of them at a time
    besides the stack.

    Args:
        experts: for each expert the linears that are to lie behind each other; all of them ``stackable``.
        device: where to.
    """
    first, parts = experts[0][0], len(experts[0])
    bands, columns = first.out_features // TILE_SIDE, first.in_features // TILE_SIDE
    shape = (len(experts), parts * bands, columns, first.code.units_per_tile // 2)
    words = torch.empty(shape, dtype=torch.int32, device=device)
    scale = torch.empty(len(experts), parts * first.out_features, dtype=torch.float16, device=device)
    signs = first.signs.to(device)
    for expert, linears in enumerate(experts):
        for part, linear in enumerate(linears):
            own_words = words[expert, part * bands : (part + 1) * bands]
            own_scale = scale[expert, part * first.out_features : (part + 1) * first.out_features]
            own_words.copy_(gpu.words_of(linear.packed, device))
            own_scale.copy_(linear.scale)
            linear.hold_words(own_words, own_scale, signs)
    return MatrixStack(words, scale, signs, first.rotation_block, first.code)


def run_selected(
    gate_up: MatrixStack, down: MatrixStack, states: Tensor, selected: Tensor, weights: Tensor
) -> Tensor:
    """A few tokens: each pair of a token and one of its experts is a row of its own; nothing waits for the GPU.

    Args:
        gate_up: (E, 2 I) by H.
        down: (E, H) by I.
        states: (T, H) float32.
        selected: (T, k) integers.
        weights: (T, k) float32.

    Returns:
        (T, H) float32.
    """
    from ernieq.kernels.trellis_matmul import cuda

    chosen = selected.to(torch.int32).contiguous()
    inputs = gpu.rotate_half(states, gate_up.signs, gate_up.rotation_block)
    inner = cuda.multiply_selected(
        inputs.x, inputs.scale, gate_up.words, gate_up.scale, gate_up.code, chosen, shared_input=True
    )  # (T k, 2 I)
    middle = gpu.silu_mul_rotate(inner, down.signs, down.rotation_block)
    output = cuda.multiply_selected(
        middle.x, middle.scale, down.words, down.scale, down.code, chosen, shared_input=False
    )  # (T k, H)
    return weighted_sum(output, weights)


def run_grouped(
    gate_up: MatrixStack, down: MatrixStack, states: Tensor, selected: Tensor, weights: Tensor
) -> Tensor:
    """Some rows an expert: all experts in one kernel per product; arguments as of ``run_selected``."""
    from ernieq.kernels.trellis_matmul import cuda

    order, offsets = by_expert(selected, gate_up.words.shape[0])
    inputs = gpu.rotate_half(states, gate_up.signs, gate_up.rotation_block)
    tokens = order // selected.shape[1]
    x, x_scale = inputs.x.index_select(0, tokens), inputs.scale.index_select(0, tokens)  # (T k, H), (T k,)
    inner = cuda.multiply_grouped(x, x_scale, gate_up.words, gate_up.scale, gate_up.code, offsets)
    middle = gpu.silu_mul_rotate(inner, down.signs, down.rotation_block)
    output = cuda.multiply_grouped(middle.x, middle.scale, down.words, down.scale, down.code, offsets)
    return weighted_sum(torch.empty_like(output).index_copy_(0, order, output), weights)


def run_decoded(
    gate_up: MatrixStack, down: MatrixStack, states: Tensor, selected: Tensor, weights: Tensor
) -> Tensor:
    """Many rows an expert: several experts are decoded at a time; arguments as of ``run_selected``."""
    count = gate_up.words.shape[0]
    order, offsets = by_expert(selected, count)
    inputs = gpu.rotate_half(states, gate_up.signs, gate_up.rotation_block)
    tokens, row_weights = order // selected.shape[1], weights.flatten().index_select(0, order)[:, None]
    bounds = offsets.tolist()  # the one wait for the GPU
    total = torch.zeros_like(states)
    step = min(
        count,
        gpu.experts_at_a_time(
            gate_up.scale.shape[1] * states.shape[1] + down.scale.shape[1] * down.signs.shape[0]
        ),
    )
    room = gate_up.buffer(step), down.buffer(step)
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        matrices = zip(gate_up.decode(some, room[0]), down.decode(some, room[1]), strict=True)
        for expert, (gate_up_weight, down_weight) in enumerate(matrices, first):
            rows = slice(bounds[expert], bounds[expert + 1])
            if rows.start == rows.stop:
                continue
            own = tokens[rows]
            inner = gpu.half_product(inputs.x.index_select(0, own), gate_up_weight)
            inner *= inputs.scale.index_select(0, own)[:, None]
            middle = gpu.silu_mul_rotate(inner, down.signs, down.rotation_block)
            output = gpu.half_product(middle.x, down_weight)
            total.index_add_(0, own, output.mul_(middle.scale[:, None] * row_weights[rows]))
    return total


def by_expert(selected: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort pairs of a token and an expert by expert, without waiting for the GPU.

    Returns:
        Places in ``selected``, (T k,) int64, and the first row of each expert, (E + 1,) int32.
    """
    chosen, order = selected.flatten().sort(stable=True)
    edges = torch.arange(experts + 1, device=selected.device, dtype=chosen.dtype)
    return order, torch.searchsorted(chosen, edges, out_int32=True)


def weighted_sum(output: Tensor, weights: Tensor) -> Tensor:
    """(T k, H) and (T, k) -> (T, H)."""
    return torch.einsum("tkh,tk->th", output.view(*weights.shape, -1), weights)
