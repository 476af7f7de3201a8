"""From a loaded model to its plan.

Matrices that read the same input are put below each other in one tensor, of which the model's own modules keep
views: the weights exist once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ernieq.decode import TrellisEmbedding, TrellisExperts, TrellisHead, TrellisLinear, TrellisWeight
from ernieq.kernels.token_step.cuda import MOST_CHOICES, MOST_EXPERTS
from ernieq.model import DecoderLayer, ErnieForCausalLM, ModelConfig
from ernieq.runtime.plan import (
    ExpertStack,
    GatedPlan,
    LayerPlan,
    ModelPlan,
    PackedMatrix,
    Product,
    Rotation,
    RoutedPlan,
)
from ernieq.trellis import TILE_SIDE

# What the kernels of a token step are made for.
_ROTATION_BLOCKS = (16, 32, 64, 128)
_HEAD_DIM_STEP = 32
_MOST_HEAD_DIM = 256


def why_not(model: ErnieForCausalLM) -> str:
    """Why a model has no plan, as the end of a sentence; empty if it has one."""
    return _why_not_shape(model.config) or _why_not_weights(model)


def _why_not_shape(config: ModelConfig) -> str:
    if config.head_dim % _HEAD_DIM_STEP or config.head_dim > _MOST_HEAD_DIM:
        allowed = f"multiples of {_HEAD_DIM_STEP} up to {_MOST_HEAD_DIM}"
        return f"heads have {config.head_dim} channels; allowed are {allowed}"
    if config.moe_num_experts > MOST_EXPERTS or config.moe_k > MOST_CHOICES:
        return (
            f"it chooses {config.moe_k} of {config.moe_num_experts} experts; the limit is {MOST_CHOICES} of "
            f"{MOST_EXPERTS}"
        )
    return ""


def _why_not_weights(model: ErnieForCausalLM) -> str:
    named: list[tuple[str, Any, type | tuple[type, ...]]] = [
        ("model.embed_tokens", model.model.embed_tokens, TrellisEmbedding),
        ("lm_head", model.lm_head, (TrellisHead, TrellisLinear)),
    ]
    groups: list[tuple[str, list[TrellisWeight]]] = []
    for index, layer in enumerate(_layers(model)):
        prefix = f"model.layers.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        named += [(f"{prefix}.self_attn", linear, TrellisLinear) for linear in (*readers, attention.o_proj)]
        groups.append((f"{prefix}.self_attn", readers))
        gated = mlp.shared_experts if layer.is_moe else mlp
        if layer.is_moe:
            named.append((f"{prefix}.mlp.experts", mlp.experts, TrellisExperts))
        if gated is not None:
            parts = (gated.gate_proj, gated.up_proj, gated.down_proj)
            named += [(f"{prefix}.mlp", linear, TrellisLinear) for linear in parts]
            groups.append((f"{prefix}.mlp", [gated.gate_proj, gated.up_proj]))
    for name, module, kind in named:
        if not isinstance(module, kind):
            return f"{name} holds weights that are not in the trellis code"
        if isinstance(module, TrellisWeight) and not module.on_gpu:
            return f"{name} is not on a GPU"
        if isinstance(module, TrellisExperts) and not module.stacked:
            return f"the experts of {name} differ in code or rotation"
    for part in model.modules():
        if isinstance(part, TrellisWeight) and part.rotation_block not in _ROTATION_BLOCKS:
            return f"a matrix is rotated in blocks of {part.rotation_block}; allowed are 16 to 128"
    for name, group in groups:
        if not all(_same_rotation(group[0], module) for module in group):
            return f"matrices of {name} that read the same input are rotated differently"
    return ""


def gather(model: ErnieForCausalLM) -> ModelPlan:
    """Make the plan of a model for which ``why_not`` is empty."""
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, TrellisEmbedding)
    if isinstance(head, TrellisHead):
        head_product = Product(_rotation(head.embedding), (_matrix(head.embedding),), _float(head.bias))
    else:
        assert isinstance(head, TrellisLinear)
        head_product = _joined([head])
    return ModelPlan(
        config=model.config,
        embedding=Product(_rotation(embedding), (_matrix(embedding),)),
        layers=tuple(_layer(layer, model.config.hidden_size) for layer in _layers(model)),
        norm=_float32(model.model.norm.weight),
        head=head_product,
    )


def _layers(model: ErnieForCausalLM) -> list[Any]:
    layers = list(model.model.layers)
    assert all(isinstance(layer, DecoderLayer) for layer in layers)
    return layers


def _layer(layer: Any, hidden_size: int) -> LayerPlan:
    attention, mlp = layer.self_attn, layer.mlp
    gated = mlp.shared_experts if layer.is_moe else mlp
    routed = _routed(mlp, hidden_size) if layer.is_moe else None
    return LayerPlan(
        input_norm=_float32(layer.input_layernorm.weight),
        qkv=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        output=_joined([attention.o_proj]),
        feed_forward_norm=_float32(layer.post_attention_layernorm.weight),
        gated=None if gated is None else _gated(gated, routed),
        routed=routed,
    )


def _gated(mlp: Any, routed: RoutedPlan | None) -> GatedPlan:
    """The plan of an MLP; if its input is rotated as that of the routed experts, it has their very rotation."""
    gate_up = _joined([mlp.gate_proj, mlp.up_proj])
    if routed is not None:
        mine, theirs = gate_up.rotation, routed.gate_up.rotation
        if mine.block == theirs.block and torch.equal(mine.signs, theirs.signs):
            gate_up = dataclasses.replace(gate_up, rotation=theirs)
    return GatedPlan(gate_up, _joined([mlp.down_proj]))


def _routed(mlp: Any, hidden_size: int) -> RoutedPlan:
    experts = mlp.experts
    bias = _float32(mlp.moe_statics.e_score_correction_bias).reshape(-1)
    router = _float32(mlp.gate.weight)
    assert router.shape == (bias.shape[0], hidden_size)
    return RoutedPlan(
        router=router,
        bias=bias,
        gate_up=_stack(experts.gate_up),
        down=_stack(experts.down),
    )


def _stack(stack: Any) -> ExpertStack:
    rotation = Rotation(stack.signs, stack.rotation_block)
    return ExpertStack(rotation, stack.words, stack.scale, stack.code)


def _same_rotation(first: TrellisWeight, other: TrellisWeight) -> bool:
    return first.rotation_block == other.rotation_block and torch.equal(first.signs, other.signs)


def _rotation(module: TrellisWeight) -> Rotation:
    return Rotation(module.signs.contiguous(), module.rotation_block)


def _matrix(module: TrellisWeight) -> PackedMatrix:
    return PackedMatrix(module.words, module.scale, module.code)


def _joined(linears: Sequence[TrellisLinear]) -> Product:
    """The product with linears that read one input, in their order; neighbours of one code are one matrix."""
    runs: list[list[TrellisLinear]] = []
    for linear in linears:
        if runs and runs[-1][0].code == linear.code:
            runs[-1].append(linear)
        else:
            runs.append([linear])
    bias = None
    if any(linear.bias is not None for linear in linears):
        zeros = [linear.scale.new_zeros(linear.out_features, dtype=torch.float32) for linear in linears]
        parts = [
            zero if linear.bias is None else _float32(linear.bias)
            for zero, linear in zip(zeros, linears, strict=True)
        ]
        bias = torch.cat(parts)
    return Product(_rotation(linears[0]), tuple(_stand(run) for run in runs), bias)


def _stand(linears: Sequence[TrellisLinear]) -> PackedMatrix:
    """Put matrices below each other, and leave their modules views of the whole."""
    if len(linears) == 1:
        return _matrix(linears[0])
    words = torch.cat([linear.words for linear in linears])  # (rows / 16, columns / 16, 8 K)
    scale = torch.cat([linear.scale for linear in linears])
    start = 0
    for linear in linears:
        stop = start + linear.out_features
        linear.hold_words(words[start // TILE_SIDE : stop // TILE_SIDE], scale[start:stop], linear.signs)
        start = stop
    return PackedMatrix(words, scale, linears[0].code)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _float32(bias)
