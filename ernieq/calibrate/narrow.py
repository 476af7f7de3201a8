"""A layer on a GPU: its weights keep the 16 bits of the checkpoint and are widened one by one when used.

A MoE layer of the 21B model is 1.5 GB in bf16; float32 copies of it and of its quantized twin would be 6 GB.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from ernieq.kernels.precision import float32_products
from ernieq.model import DecoderLayer
from ernieq.model.attention import Attention
from ernieq.model.mlp import Router
from ernieq.model.rotary import rotate_pairs


class NarrowLinear(nn.Linear):
    """A linear whose weight may have fewer bits than its input; it computes in the input's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return functional.linear(states, self.weight.to(states.dtype), bias)


class ExactRouter(NarrowLinear):
    """A router that keeps all bits of its products: a rounding must not choose another expert."""

    def forward(self, states: Tensor) -> Tensor:
        """(N, H) to (N, E) float32 logits."""
        with float32_products(states.device, tensor_cores=False):
            return super().forward(states.float())


def narrow_layer(layer: DecoderLayer, device: torch.device) -> DecoderLayer:
    """Put a layer on a device, where its linears widen what they multiply; the layer itself is changed."""
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, Router):
                setattr(module, name, ExactRouter(child))
            elif type(child) is nn.Linear:
                setattr(module, name, NarrowLinear(child))
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(device, non_blocking=True)
    return layer


def shared_copy(layer: DecoderLayer) -> DecoderLayer:
    """A layer with parameters of its own that lie, until they are replaced, in the memory of the original's."""
    shared = {id(old): nn.Parameter(old.data, requires_grad=False) for old in layer.parameters()}
    return copy.deepcopy(layer, dict(shared))


def full_context(attention: Attention, normed: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """``attention.context`` without a cache, with keys and values repeated for all heads.

    torch's memory-efficient kernel takes no grouped keys; without it a GPU would hold all float32 scores.
    """
    head_dim = 2 * rotary[0].shape[-1]

    def heads(states: Tensor) -> Tensor:
        return states.reshape(*states.shape[:2], -1, head_dim).transpose(1, 2)  # (B, heads, T, head_dim)

    query = rotate_pairs(heads(attention.q_proj(normed)), rotary)
    key = rotate_pairs(heads(attention.k_proj(normed)), rotary)
    value = heads(attention.v_proj(normed))
    groups = query.shape[1] // key.shape[1]
    attended = functional.scaled_dot_product_attention(
        query.contiguous(),
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        is_causal=normed.shape[1] > 1,
    )
    context: Tensor = attended.transpose(1, 2).flatten(2)
    return context
