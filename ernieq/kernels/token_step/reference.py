"""The slow truth of a token step's parts, in plain torch; arguments and results as in ``cuda.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ernieq.kernels.hadamard.reference import rotate as rotate_float


def rotated(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """(N, C) float32 in the rotated basis, not rounded."""
    return rotate_float(x, signs, block)


def silu_mul_rotated(gate_up: Tensor, signs: Tensor, block: int) -> Tensor:
    """(N, 2 I) -> (N, I) float32, not rounded."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return rotate_float((functional.silu(gate) * up).float(), signs, block)


def add_norm(
    hidden: Tensor,
    delta: Tensor | None,
    expert_out: Tensor | None,
    expert_weights: Tensor | None,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """New hidden states and their norm, each (T, H) float32."""
    total = hidden.double()
    if delta is not None:
        total = total + delta
    if expert_out is not None and expert_weights is not None:
        parts = expert_out.double().view(*expert_weights.shape, -1)
        total = total + (parts * expert_weights.double()[..., None]).sum(dim=1)
    normed = total * torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps) * norm_weight
    return total.float(), normed.float()


def route(normed: Tensor, router: Tensor, bias: Tensor, norm_min: float, choices: int) -> tuple[Tensor, Tensor]:
    """Selected experts (T, k) int64 and their weights (T, k) float32."""
    probabilities = (normed.double() @ router.double().T).softmax(dim=-1)
    selected = (probabilities + bias).argsort(dim=-1, descending=True, stable=True)[:, :choices]
    chosen = probabilities.gather(-1, selected)
    return selected, (chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=norm_min)).float()


def attend(qkv: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one new token per sequence: (T, heads D) float32; writes its key and value."""
    tokens, kv_heads, _, head_dim = keys.shape
    rows = qkv.double().view(tokens, -1, head_dim)
    heads = rows.shape[1] - 2 * kv_heads
    contexts = []
    for token in range(tokens):
        place = int(position[token])
        cosine, sine = angles[place].double().unbind(-1)
        even, odd = rows[token, : heads + kv_heads].unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2)
        keys[token, :, place] = turned[heads:].to(keys.dtype)
        values[token, :, place] = rows[token, heads + kv_heads :].to(values.dtype)
        past = keys[token, :, : place + 1].double().repeat_interleave(heads // kv_heads, dim=0)
        weights = (turned[:heads, None] @ past.transpose(1, 2) / head_dim**0.5).softmax(dim=-1)
        stored = values[token, :, : place + 1].double().repeat_interleave(heads // kv_heads, dim=0)
        contexts.append((weights @ stored).flatten())
    return torch.stack(contexts).float()
