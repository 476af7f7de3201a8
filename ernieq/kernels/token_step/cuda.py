"""The parts of a token step between its products, on a GPU, in few launches; the truth is ``reference.py``.

Everything writes into buffers that the caller keeps, nothing waits for the GPU, so that a whole step can be
captured in a CUDA graph. Letters: T sequences of one new token each, H hidden width, E experts, k of them
selected, I expert width, D head dimension.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ernieq.errors import ShapeError
from ernieq.kernels.cuda import cuda_kernel

MOST_EXPERTS = 256
MOST_CHOICES = 32
_ROUTE_WARPS = 4
_ATTEND_THREADS = 256
_MERGERS = 8  # kMergers in attention.cu
_TOKEN_STEP = Path(__file__).with_name("token_step.cu")
_ATTENTION = Path(__file__).with_name("attention.cu")


class Rotated(NamedTuple):
    """Rows in a rotated basis: the true values are ``x * scale[:, None]``.

    Attributes:
        x: (N, C) float16, the largest of each row between 8 and 16.
        scale: (N,) float32, powers of two.
    """

    x: Tensor
    scale: Tensor


def rotate(x: Tensor, signs: Tensor, block: int, out: Rotated) -> None:
    """Rotate rows and round them to float16.

    Args:
        x: (N, C) float32.
        signs: (C,) int8.
        block: side of the Hadamard blocks, 16 to 128.
        out: (N, C).
    """
    rows, width = x.shape
    _launch_rows("rotate_rows", block, rows, width, x, signs, out.x, out.scale, width)


def silu_mul_rotate(gate_up: Tensor, signs: Tensor, block: int, out: Rotated) -> None:
    """The input of a down projection: ``silu(gate) * up``, rotated and rounded to float16.

    Args:
        gate_up: (N, 2 I) float32, gate first.
        signs: (I,) int8.
        block: side of the Hadamard blocks.
        out: (N, I).
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    _launch_rows("silu_mul_rotate_rows", block, rows, width, gate_up, signs, *out, width)


def add_gathered(hidden: Tensor, rows: Tensor, places: Tensor, factors: Tensor) -> None:
    """Add weighted rows to the hidden states, those of a token in their order.

    Args:
        hidden: (N, H) float32, changed in place: ``+ sum_i factors[:, i] rows[places[:, i]]``.
        rows: (P, H) float32.
        places: (N, k) int64.
        factors: (N, k) float32.
    """
    tokens, width = hidden.shape
    with torch.cuda.device(hidden.device):
        kernel = cuda_kernel(_TOKEN_STEP, "add_gathered_rows")
        kernel((tokens,), 256, hidden, rows, places, factors, places.shape[1], width)


def add_norm_rotate(
    hidden: Tensor,
    delta: Tensor | None,
    expert_out: Tensor | None,
    expert_weights: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    signs: Tensor | None,
    block: int,
    out: Rotated | None,
    normed: Tensor | None,
) -> None:
    """Add what a sub-layer gave to the hidden states, and make the input of the next one.

    Args:
        hidden: (T, H) float32, changed in place: ``+ delta + sum_i expert_weights[:, i] expert_out[:, i]``.
        delta: (T, H) float32, or None.
        expert_out: (T k, H) float32, or None.
        expert_weights: (T, k) float32, with ``expert_out``.
        norm_weight: (H,) float32 of the RMS norm.
        eps: of the norm.
        signs: (H,) int8 of the rotation, with ``out``.
        block: side of the Hadamard blocks.
        out: (T, H), the rotated normalised states; None if not wanted.
        normed: (T, H) float32, the normalised states; None if not wanted.
    """
    tokens, width = hidden.shape
    choices = 0 if expert_weights is None else expert_weights.shape[1]
    x, scale = (None, None) if out is None else out
    _launch_rows(
        "add_norm_rotate_rows", block, tokens, width,
        hidden, delta, expert_out, expert_weights, choices, norm_weight, float(eps), signs, x, scale, normed,
        width,
    )  # fmt: skip


def route(
    normed: Tensor, router: Tensor, bias: Tensor, norm_min: float, selected: Tensor, weights: Tensor
) -> None:
    """Choose experts as ``ernieq.model.SparseMlp.route`` does; of equal scores the lower number wins.

    Args:
        normed: (T, H) float32.
        router: (E, H) float32, E at most 256.
        bias: (E,) float32, which takes part in the choice only.
        norm_min: least divisor of the weights.
        selected: (T, k) int32, written.
        weights: (T, k) float32, written.

    Raises:
        ShapeError: more experts or choices than the kernel holds.
    """
    tokens, choices = selected.shape
    experts, width = router.shape
    if experts > MOST_EXPERTS or choices > MOST_CHOICES:
        raise ShapeError(f"{choices} of {experts} experts; the GPU routes to {MOST_CHOICES} of {MOST_EXPERTS}")
    logits, finished = _route_buffers(normed.device, torch.cuda.current_stream(normed.device).cuda_stream)
    with torch.cuda.device(normed.device):
        cuda_kernel(_TOKEN_STEP, "route_tokens", EXPERTS=experts)(
            (-(-experts // _ROUTE_WARPS), tokens), 32 * _ROUTE_WARPS,
            normed, router, bias, float(norm_min), selected, weights, logits, finished, experts, choices, width,
        )  # fmt: skip


def attend_workspace(tokens: int, heads: int, head_dim: int, splits: int) -> int:
    """Float32 numbers that ``attend`` needs as workspace."""
    return tokens * heads * splits * (head_dim + 2)


def attend(
    qkv: Tensor,
    angles: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    context: Tensor,
    workspace: Tensor,
    splits: int,
) -> None:
    """Attention of one new token per sequence, whose key and value are written into the cache.

    Args:
        qkv: (T, (heads + 2 kv_heads) D) float32, before the rotary encoding.
        angles: (positions, D / 2, 2) float32 cosine and sine.
        keys: (T, kv_heads, max_tokens, D) float16, changed at ``position``.
        values: like ``keys``.
        position: (T,) int32, below max_tokens.
        context: (T, heads D) float32, written.
        workspace: ``attend_workspace`` float32 numbers.
        splits: most parts that the keys are divided into; a short context uses fewer.
    """
    tokens, kv_heads, max_tokens, head_dim = keys.shape
    heads = context.shape[1] // head_dim
    constants = {"HEAD_DIM": head_dim, "GROUP": heads // kv_heads}
    with torch.cuda.device(qkv.device):
        cuda_kernel(_ATTENTION, "attend_split", **constants)(
            (splits, kv_heads, tokens), _ATTEND_THREADS,
            qkv, angles, keys, values, position, workspace, kv_heads, max_tokens,
        )  # fmt: skip
        merge = cuda_kernel(_ATTENTION, "attend_merge", **constants)
        merge((heads, tokens), _MERGERS * head_dim, workspace, position, context, splits)


def advance(position: Tensor) -> None:
    """Count one token more in every sequence: (T,) int32, T at most 1024."""
    with torch.cuda.device(position.device):
        cuda_kernel(_TOKEN_STEP, "advance_positions")((1,), position.shape[0], position, position.shape[0])


def _launch_rows(name: str, block: int, rows: int, width: int, *arguments: Tensor | int | float | None) -> None:
    """Launch a kernel with one block of threads a row, whose shared memory holds the row."""
    segment = max(block, 32)
    segments = -(-width // segment)
    device = next(item.device for item in arguments if isinstance(item, Tensor))
    with torch.cuda.device(device):
        kernel = cuda_kernel(_TOKEN_STEP, name, BLOCK=block)
        kernel((rows,), 32 * min(segments, 32), *arguments, shared_bytes=4 * segments * segment)


@cache
def _route_buffers(device: torch.device, _stream: int) -> tuple[Tensor, Tensor]:
    """Logits, and how many blocks of a token are done: zeros between launches, so one pair a stream will do."""
    return (
        torch.empty(1024, MOST_EXPERTS, dtype=torch.float32, device=device),
        torch.zeros(1024, dtype=torch.int32, device=device),
    )
