"""The routed experts of a layer as one operator of torch.

Shapes: N tokens, E experts that this process holds, k experts per token, H hidden width, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ernieq.decode import stack
from ernieq.decode.stack import MatrixStack
from ernieq.integrations.vllm.geometry import MatrixPart, read_parts
from ernieq.integrations.vllm.operators import holds_words
from ernieq.kernels.hadamard import rotate
from ernieq.kernels.trellis_matmul import matmul


@torch.library.custom_op("ernieq::packed_experts", mutates_args=())
def packed_experts(
    x: Tensor,
    weights: Tensor,
    selected: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    parts: Sequence[int],
    grouped_rows: int,
) -> Tensor:
    """Weighted sum of the experts that each token selected.

    Args:
        x: (N, H).
        weights: (N, k) float32.
        selected: (N, k) integers below E.
        gate_up: tiles (E, 2 I / 16, H / 16, 16 K) int16, or 8 K int32 on a GPU; scale (E, 2 I) float16; signs
            (H,) int8.
        down: the same of (E, H) by I.
        parts: the numbers of one expert's gate_up (2 I by H) and down (H by I).
        grouped_rows: up to so many pairs of a token and an expert, a GPU runs the way that never waits for it.

    Returns:
        (N, H) in the dtype of ``x``; sums are formed in float32.
    """
    first, second = read_parts(parts)
    states = x.detach().float().contiguous()
    if not x.shape[0]:
        return torch.zeros_like(x)
    if not holds_words(gate_up[0]):
        return _run_on_cpu(states, weights.float(), selected.long(), gate_up, down, (first, second)).to(x.dtype)
    stacks = _as_stack(gate_up, first), _as_stack(down, second)
    rows, experts = selected.numel(), gate_up[0].shape[0]
    if x.shape[0] <= stack.SELECTED_TOKENS:
        run = stack.run_selected
    elif rows <= max(grouped_rows, stack.GROUPED_ROWS * experts):
        run = stack.run_grouped
    else:
        run = stack.run_decoded
    return run(*stacks, states, selected.long(), weights.float()).to(x.dtype)


@packed_experts.register_fake
def _shape_of_experts(x: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(x)


def _as_stack(tensors: Sequence[Tensor], part: MatrixPart) -> MatrixStack:
    words, scale, signs = tensors
    return MatrixStack(words, scale, signs, part.rotation_block, part.code)


def _run_on_cpu(
    states: Tensor,
    weights: Tensor,
    selected: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    parts: tuple[MatrixPart, MatrixPart],
) -> Tensor:
    """Each expert once over its own tokens; a token's sum is formed in the order of expert numbers."""
    (tiles, scale, signs), (down_tiles, down_scale, down_signs) = gate_up, down
    rotated = rotate(states, signs, parts[0].rotation_block)
    total = torch.zeros_like(states)
    order = selected.flatten().argsort(stable=True)  # (N k,)
    weights = weights.flatten()
    counts = selected.flatten().bincount(minlength=tiles.shape[0]).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        places = order[start : start + count]
        tokens = places // selected.shape[1]
        start += count
        both = matmul(rotated.index_select(0, tokens), tiles[expert], scale[expert], parts[0].code)  # (n, 2 I)
        gate, up = both.chunk(2, dim=1)
        inner = rotate(functional.silu(gate) * up, down_signs, parts[1].rotation_block)
        output = matmul(inner, down_tiles[expert], down_scale[expert], parts[1].code)  # (n, H)
        total.index_add_(0, tokens, output * weights[places, None])
    return total
