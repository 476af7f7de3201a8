"""Stand-ins for the GPU kernels in plain torch, so that what calls them can be tested without a GPU.

They take and give what the kernels do, buffers included, and run on any device. ``install`` puts them in place
of the kernels for one test; ``hold_words`` then makes modules on the CPU believe that they are on a GPU.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ernieq.decode import TrellisExperts, TrellisWeight
from ernieq.kernels.hadamard import reference as hadamard
from ernieq.kernels.token_step import cuda as token_step
from ernieq.kernels.token_step import reference as step_reference
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as trellis_matmul
from ernieq.kernels.trellis_matmul import reference as trellis_reference
from ernieq.trellis import TrellisCode

Module = TypeVar("Module", bound=nn.Module)
PRODUCTS = ("decode", "multiply", "multiply_selected", "multiply_grouped")
PIECES = ("rotate", "silu_mul_rotate", "add_norm_rotate", "add_gathered", "route", "attend", "advance")


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the kernels; the list that is returned grows by a name with every call."""
    calls: list[str] = []

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return globals()[name](*arguments, **options)

        return call

    for module, names in ((trellis_matmul, PRODUCTS), (token_step, PIECES)):
        for name in names:
            monkeypatch.setattr(module, name, counted(name))
    return calls


def hold_words(module: Module) -> Module:
    """Bring packed modules into the state that a move to a GPU leaves them in, but on the CPU."""
    parts = list(module.modules())
    for kind in (TrellisExperts, TrellisWeight):  # experts first: they stack their matrices
        for part in parts:
            if isinstance(part, kind) and not getattr(part, "on_gpu", False):
                part.move(torch.device("cpu"))
    return module


def decode(
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    assert words.is_contiguous()
    assert scale.is_contiguous()
    pairs = torch.stack((words >> 16, words), dim=-1).flatten(-2) & 0xFFFF  # first unit in the high half
    packed = torch.where(pairs >= 1 << 15, pairs - (1 << 16), pairs).to(torch.int16)
    weights = trellis_reference.decode(packed.cpu(), scale.cpu(), code).to(words.device)
    return weights.to(dtype) if out is None else out.copy_(weights)


def multiply(
    x: Tensor, x_scale: Tensor, words: Tensor, scale: Tensor, code: TrellisCode, *, out: Tensor | None = None
) -> Tensor:
    assert x.dtype == torch.float16
    product = x.float() @ decode(words, scale, code).T * x_scale[:, None]
    return product if out is None else out.copy_(product)


def multiply_selected(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    selected: Tensor,
    shared_input: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    assert selected.dtype == torch.int32
    assert selected.shape[0] <= 8
    rows = []
    for pair, expert in enumerate(selected.flatten().tolist()):
        row = pair // selected.shape[1] if shared_input else pair
        rows.append(multiply(x[row, None], x_scale[row, None], words[expert], scale[expert], code))
    product = torch.cat(rows)
    return product if out is None else out.copy_(product)


def multiply_grouped(
    x: Tensor,
    x_scale: Tensor,
    words: Tensor,
    scale: Tensor,
    code: TrellisCode,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    assert offsets.dtype == torch.int32
    assert offsets.shape == (words.shape[0] + 1,)
    bounds = offsets.tolist()
    product = torch.cat(
        [
            multiply(x[first:last], x_scale[first:last], words[expert], scale[expert], code)
            for expert, (first, last) in enumerate(pairwise(bounds))
        ]
    )
    return product if out is None else out.copy_(product)


def rotate(x: Tensor, signs: Tensor, block: int, out: Rotated) -> None:
    assert x.is_contiguous()
    rotated = hadamard.rotate(x.cpu(), signs.cpu(), block).to(x.device)
    _, exponent = torch.frexp(rotated.abs().amax(dim=1))
    out.scale.copy_(torch.ldexp(torch.ones_like(out.scale), exponent - 4))  # the largest lies in 8 to 16
    out.x.copy_(rotated / out.scale[:, None])


def silu_mul_rotate(gate_up: Tensor, signs: Tensor, block: int, out: Rotated) -> None:
    gate, up = gate_up.chunk(2, dim=1)
    rotate((functional.silu(gate) * up).contiguous(), signs, block, out)


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
    total, states = step_reference.add_norm(hidden, delta, expert_out, expert_weights, norm_weight, eps)
    hidden.copy_(total)
    if normed is not None:
        normed.copy_(states)
    if out is not None and signs is not None:
        rotate(states, signs, block, out)


def add_gathered(hidden: Tensor, rows: Tensor, places: Tensor, factors: Tensor) -> None:
    hidden += (rows[places] * factors[..., None]).sum(dim=1)


def route(
    normed: Tensor, router: Tensor, bias: Tensor, norm_min: float, selected: Tensor, weights: Tensor
) -> None:
    chosen, shares = step_reference.route(normed, router, bias, norm_min, selected.shape[1])
    selected.copy_(chosen)
    weights.copy_(shares)


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
    tokens, _, _, head_dim = keys.shape
    heads = context.shape[1] // head_dim
    assert workspace.numel() >= token_step.attend_workspace(tokens, heads, head_dim, splits)
    context.copy_(step_reference.attend(qkv, angles, keys, values, position))


def advance(position: Tensor) -> None:
    position += 1
