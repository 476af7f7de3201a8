"""ERNIE 4.5, dense and MoE, in plain torch, unaware of bits.

    config.py       what config.json says                attention.py    grouped-query attention
    parameters.py   names, shapes, roles of tensors      mlp.py          gated MLP, router, experts
    rotary.py       positions                            transformer.py  layers, the whole model
    cache.py        keys and values of earlier tokens

The truth is transformers' implementation: logits are compared with it on random small models. The first two
files need no torch; whatever does is imported when it is first asked for, so that a checkpoint can be verified
where there is none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ernieq.model.config import ModelConfig
from ernieq.model.parameters import ParameterRole, ParameterSpec, expected_parameters, layer_parameters

if TYPE_CHECKING:
    from ernieq.model.attention import Attention
    from ernieq.model.cache import KVCache
    from ernieq.model.mlp import Experts, Mlp, Routing, SparseMlp
    from ernieq.model.rotary import Rotary
    from ernieq.model.stacked import StackedExperts
    from ernieq.model.transformer import Decoder, DecoderLayer, ErnieForCausalLM, RmsNorm, TokenEmbedding

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
    "TokenEmbedding",
    "expected_parameters",
    "layer_parameters",
]

_TORCH_MODULES = {
    "attention": ("Attention",),
    "cache": ("KVCache",),
    "mlp": ("Experts", "Mlp", "Routing", "SparseMlp"),
    "rotary": ("Rotary",),
    "stacked": ("StackedExperts",),
    "transformer": ("Decoder", "DecoderLayer", "ErnieForCausalLM", "RmsNorm", "TokenEmbedding"),
}
_MODULE_OF = {name: module for module, names in _TORCH_MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a class that needs torch."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"ernieq.model.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
