"""The GPU's kernels in plain torch on the CPU, so that what is built of them can be tested on any machine.

They follow the kernels' signatures and their numeric types (float16 inputs with a power of two per row), and
are slow. ``install`` puts them where the kernels are called from.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ernieq.kernels.hadamard import reference as hadamard
from ernieq.kernels.token_step import cuda as token_step
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.kernels.trellis_matmul import reference
from ernieq.model.rotary import rotate_pairs
from ernieq.trellis import TrellisCode


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels by those of this file until the test ends."""
    for name in ("decode", "multiply", "multiply_selected", "multiply_grouped"):
        monkeypatch.setattr(matmul, name, globals()[name])
    for name in (
        "rotate", "add_norm_rotate", "route", "attend", "attend_workspace", "silu_mul_rotate", "add_gathered",
        "advance",
    ):  # fmt: skip
        monkeypatch.setattr(token_step, name, globals()[name])


def packed_of(words: Tensor) -> Tensor:
    """Inverse of ``to_words``: (..., 8 K) int32 -> (..., 16 K) int16."""
    return ((words << 16) | ((words >> 16) & 0xFFFF)).contiguous().view(torch.int16)


def decode(
    words: Tensor, scale: Tensor, code: TrellisCode, *, out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    weights = reference.decode(packed_of(words), scale, code)
    if out is None:
        return weights.to(dtype)
    assert out.is_contiguous()
    assert out.shape == weights.shape
    return out.copy_(weights)


def multiply(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, code: TrellisCode, *, out: Tensor | None = None
) -> Tensor:
    assert x.dtype == torch.float16
    assert x_scale.dtype == torch.float32
    return _into((x.float() @ decode(words, scale, code).T) * x_scale[:, None], out)


def multiply_selected(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, code: TrellisCode, selected: Tensor,
    shared_input: bool, *, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert selected.dtype == torch.int32
    assert selected.shape[0] <= matmul.SELECTED_LIMIT
    rows = []
    for pair, expert in enumerate(selected.flatten().tolist()):
        row = (
            slice(pair // selected.shape[1], pair // selected.shape[1] + 1)
            if shared_input
            else slice(pair, pair + 1)
        )
        rows.append(multiply(x[row], x_scale[row], words[expert], scale[expert], code))
    return _into(torch.cat(rows), out)


def multiply_grouped(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, code: TrellisCode, offsets: Tensor, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert offsets.dtype == torch.int32
    bounds = offsets.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == x.shape[0]
    parts = [
        multiply(x[start:stop], x_scale[start:stop], words[expert], scale[expert], code)
        for expert, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]
    return _into(torch.cat(parts), out)


def rotate(x: Tensor, signs: Tensor, block: int, out: Rotated) -> None:
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    rotated = hadamard.rotate(x, signs, block)
    _, exponent = torch.frexp(rotated.abs().amax(-1))
    factor = torch.ldexp(torch.ones(x.shape[0]), exponent - 4)  # the largest channel comes to 8..16
    out.x.copy_(rotated / factor[:, None])
    out.scale.copy_(factor)


def add_norm_rotate(
    hidden: Tensor, delta: Tensor | None, expert_out: Tensor | None, expert_weights: Tensor | None,
    norm_weight: Tensor, eps: float, signs: Tensor | None, block: int, out: Rotated | None,
    normed: Tensor | None,
) -> None:  # fmt: skip
    if delta is not None:
        hidden += delta
    if expert_out is not None and expert_weights is not None:
        hidden += torch.einsum("tkh,tk->th", expert_out.view(*expert_weights.shape, -1), expert_weights)
    states = functional.rms_norm(hidden, hidden.shape[-1:], norm_weight, eps)
    if normed is not None:
        normed.copy_(states)
    if out is not None and signs is not None:
        rotate(states, signs, block, out)


def route(
    normed: Tensor, router: Tensor, bias: Tensor, norm_min: float, selected: Tensor, weights: Tensor
) -> None:
    probabilities = (normed @ router.T).softmax(-1)
    chosen = (probabilities + bias).topk(selected.shape[1], dim=-1).indices
    selected.copy_(chosen)
    picked = probabilities.gather(-1, chosen)
    weights.copy_(picked / picked.sum(-1, keepdim=True).clamp(min=norm_min))


def attend(
    qkv: Tensor, angles: Tensor, keys: Tensor, values: Tensor, position: Tensor, context: Tensor,
    workspace: Tensor, splits: int,
) -> None:  # fmt: skip
    assert keys.is_contiguous()
    assert keys.dtype == torch.float16
    tokens, kv_heads, _, head_dim = keys.shape
    heads = context.shape[1] // head_dim
    for token in range(tokens):
        now = int(position[token])
        states = qkv[token].view(1, -1, 1, head_dim)
        turn = angles[now : now + 1, :, 0], angles[now : now + 1, :, 1]
        keys[token, :, now] = rotate_pairs(states[:, heads : heads + kv_heads], turn)[0, :, 0]
        values[token, :, now] = states[0, heads + kv_heads :, 0]
        attended = functional.scaled_dot_product_attention(
            rotate_pairs(states[:, :heads], turn),
            keys[token : token + 1, :, : now + 1].float(),
            values[token : token + 1, :, : now + 1].float(),
            enable_gqa=True,
        )
        context[token] = attended.flatten()


def attend_workspace(tokens: int, heads: int, head_dim: int, splits: int) -> int:
    return tokens * heads * splits * (head_dim + 2)


def silu_mul_rotate(gate_up: Tensor, signs: Tensor, block: int, out: Rotated) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    rotate((functional.silu(gate) * up).contiguous(), signs, block, out)


def add_gathered(hidden: Tensor, rows: Tensor, places: Tensor, factors: Tensor) -> None:
    hidden += (rows[places].float() * factors[..., None]).sum(dim=1)


def advance(position: Tensor) -> None:
    position += 1


def _into(result: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return result
    assert out.shape == result.shape
    return out.copy_(result)
