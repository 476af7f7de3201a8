"""Names, shapes and roles of the tensors that a configuration calls for: the one list of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ernieq.model.config import ModelConfig


class ParameterRole(Enum):
    """What a tensor is for; recipes set bits by role, and the last four are never quantized."""

    ROUTED_EXPERT = "routed_expert"
    SHARED_EXPERT = "shared_expert"
    ATTENTION = "attention"
    DENSE_MLP = "dense_mlp"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    NORM = "norm"
    BIAS = "bias"


@dataclass(frozen=True)
class ParameterSpec:
    """Shape that a tensor must have, and what it is for."""

    shape: tuple[int, ...]
    role: ParameterRole


def expected_parameters(config: ModelConfig) -> dict[str, ParameterSpec]:
    """All tensors of a model by checkpoint name, in model order; a tied head has no entry of its own."""
    vocabulary = (config.vocab_size, config.hidden_size)
    specs = {"model.embed_tokens.weight": ParameterSpec(vocabulary, ParameterRole.EMBEDDING)}
    for index in range(config.num_hidden_layers):
        specs |= layer_parameters(config, index)
    specs["model.norm.weight"] = ParameterSpec((config.hidden_size,), ParameterRole.NORM)
    if not config.tie_word_embeddings:
        specs["lm_head.weight"] = ParameterSpec(vocabulary, ParameterRole.HEAD)
    if head_has_bias(config):
        specs["lm_head.bias"] = ParameterSpec((config.vocab_size,), ParameterRole.BIAS)
    return specs


def head_has_bias(config: ModelConfig) -> bool:
    """Whether the head has a bias: with ``use_bias``, but in the MoE model only (as in transformers)."""
    return config.use_bias and config.model_type == "ernie4_5_moe"


def layer_parameters(config: ModelConfig, index: int) -> dict[str, ParameterSpec]:
    """The tensors of decoder layer ``index`` by checkpoint name."""
    prefix = f"model.layers.{index}."
    norm = ParameterSpec((config.hidden_size,), ParameterRole.NORM)
    specs = {f"{prefix}input_layernorm.weight": norm}
    specs |= _attention(config, f"{prefix}self_attn.")
    specs[f"{prefix}post_attention_layernorm.weight"] = norm
    if config.is_moe_layer(index):
        return specs | _sparse_mlp(config, f"{prefix}mlp.")
    return specs | _mlp(
        config, f"{prefix}mlp.", config.intermediate_size, ParameterRole.DENSE_MLP, config.use_bias
    )


def _linear(
    name: str, out_features: int, in_features: int, role: ParameterRole, bias: bool
) -> dict[str, ParameterSpec]:
    specs = {f"{name}.weight": ParameterSpec((out_features, in_features), role)}
    if bias:
        specs[f"{name}.bias"] = ParameterSpec((out_features,), ParameterRole.BIAS)
    return specs


def _attention(config: ModelConfig, prefix: str) -> dict[str, ParameterSpec]:
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, role, bias = config.hidden_size, ParameterRole.ATTENTION, config.use_bias
    return {
        **_linear(f"{prefix}q_proj", queries, hidden, role, bias),
        **_linear(f"{prefix}k_proj", keys, hidden, role, bias),
        **_linear(f"{prefix}v_proj", keys, hidden, role, bias),
        **_linear(f"{prefix}o_proj", hidden, queries, role, bias),
    }


def _mlp(
    config: ModelConfig, prefix: str, width: int, role: ParameterRole, bias: bool
) -> dict[str, ParameterSpec]:
    return {
        **_linear(f"{prefix}gate_proj", width, config.hidden_size, role, bias),
        **_linear(f"{prefix}up_proj", width, config.hidden_size, role, bias),
        **_linear(f"{prefix}down_proj", config.hidden_size, width, role, bias),
    }


def _sparse_mlp(config: ModelConfig, prefix: str) -> dict[str, ParameterSpec]:
    experts, width = config.moe_num_experts, config.moe_intermediate_size
    specs = {
        f"{prefix}gate.weight": ParameterSpec((experts, config.hidden_size), ParameterRole.ROUTER),
        f"{prefix}moe_statics.e_score_correction_bias": ParameterSpec((1, experts), ParameterRole.ROUTER_BIAS),
    }
    for expert in range(experts):
        # Routed experts have no biases even with use_bias, as in transformers.
        specs |= _mlp(config, f"{prefix}experts.{expert}.", width, ParameterRole.ROUTED_EXPERT, bias=False)
    if config.moe_num_shared_experts:
        shared = width * config.moe_num_shared_experts
        specs |= _mlp(config, f"{prefix}shared_experts.", shared, ParameterRole.SHARED_EXPERT, config.use_bias)
    return specs
