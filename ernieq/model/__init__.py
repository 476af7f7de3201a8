"""ERNIE 4.5, dense and MoE, in plain torch, unaware of bits.

    config.py       what config.json says                attention.py    grouped-query attention
    parameters.py   names, shapes, roles of tensors      mlp.py          gated MLP, router, experts
    rotary.py       positions                            transformer.py  layers, the whole model
    cache.py        keys and values of earlier tokens

The truth is transformers' implementation: logits are compared with it on random small models.
"""

from __future__ import annotations

from ernieq.model.attention import Attention
from ernieq.model.cache import KVCache
from ernieq.model.config import ModelConfig
from ernieq.model.mlp import Experts, Mlp, Routing, SparseMlp
from ernieq.model.parameters import ParameterRole, ParameterSpec, expected_parameters, layer_parameters
from ernieq.model.rotary import Rotary
from ernieq.model.stacked import StackedExperts
from ernieq.model.transformer import Decoder, DecoderLayer, ErnieForCausalLM, RmsNorm

__all__ = [
    "Attention",
    "Decoder",
    "DecoderLayer",
    "ErnieForCausalLM",
    "Experts",
    "KVCache",
    "Mlp",
    "ModelConfig",
    "ParameterRole",
    "ParameterSpec",
    "RmsNorm",
    "Rotary",
    "Routing",
    "SparseMlp",
    "StackedExperts",
    "expected_parameters",
    "layer_parameters",
]
