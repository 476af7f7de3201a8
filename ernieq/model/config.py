"""What a Hugging Face ``config.json`` says about an ERNIE 4.5 text model, read leniently and checked strictly.

Checkpoints in the wild lack keys, add keys and use lists where numbers belong. A key that is absent takes the
value that transformers' configuration classes give it, so that the same file means the same model in both;
a value that makes no sense is refused with a sentence that names the key. Keys that do not change the
arithmetic are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernieq.errors import CheckpointError, UnsupportedModelError

DENSE = "ernie4_5"
MOE = "ernie4_5_moe"
_ARCHITECTURES = {
    "Ernie4_5ForCausalLM": DENSE,
    "Ernie4_5_ForCausalLM": DENSE,
    "Ernie4_5_MoeForCausalLM": MOE,
}
# What transformers' Ernie4_5Config and Ernie4_5_MoeConfig fill in; sizes without an entry must be given.
_DEFAULTS: dict[str, dict[str, Any]] = {
    DENSE: {"num_key_value_heads": 2, "head_dim": 128},
    MOE: {"num_key_value_heads": 4, "head_dim": None},
}
_DEFAULT_THETA = 500000.0
# Names that transformers accepts for the same thing.
_ALIASES = {"moe_num_experts": "num_experts", "moe_k": "num_experts_per_tok"}
_MAX_SIZE = 2**24  # of a width or vocabulary: far above any model, far below what would exhaust memory here
_MAX_LAYERS = 1024
_MAX_EXPERTS = 4096
_MAX_ALL_EXPERTS = 1 << 15  # nine times those of the 300 B model; each has three names in a list that is built


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model; field names are those of ``config.json``.

    A dense model has ``moe_num_experts == 0``; ``moe_layer_end_index`` is the last layer that may hold
    experts, never -1. ``eos_token_ids`` are all ids that end a text, of which ``eos_token_id`` is the first.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = _DEFAULT_THETA
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    use_bias: bool = False
    hidden_act: str = "silu"
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 0
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = 0
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, or None."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer ``index`` (from 0) routes its tokens to experts."""
        return (
            self.moe_num_experts > 0
            and self.moe_layer_start_index <= index <= self.moe_layer_end_index
            and (index + 1) % self.moe_layer_interval == 0
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed ``config.json``.

        Args:
            raw: the JSON object; keys that are not known are ignored.

        Raises:
            UnsupportedModelError: the architecture, activation or position encoding is not implemented.
            CheckpointError: a key is missing or its value makes no sense.
        """
        model_type = _model_type(raw)
        keys = _Keys(raw, _DEFAULTS[model_type])
        heads = keys.integer("num_attention_heads")
        hidden = keys.integer("hidden_size")
        config = cls(
            model_type=model_type,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size"),
            num_hidden_layers=keys.integer("num_hidden_layers", maximum=_MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=keys.integer("num_key_value_heads", if_null=heads),
            head_dim=keys.integer("head_dim", if_null=hidden // heads),
            rms_norm_eps=keys.number("rms_norm_eps", 1e-5),
            rope_theta=_rope_theta(raw, keys),
            max_position_embeddings=keys.integer("max_position_embeddings", if_null=131072),
            tie_word_embeddings=keys.flag("tie_word_embeddings", True),
            use_bias=keys.flag("use_bias", False),
            hidden_act=_activation(raw),
            bos_token_id=keys.token("bos_token_id", 1),
            eos_token_ids=keys.tokens("eos_token_id", (2,)),
            pad_token_id=keys.token("pad_token_id", 0),
            **(_experts(keys) if model_type == MOE else {}),
        )
        _check_heads(config)
        return config


class _Keys:
    """Typed access to a JSON object; absent keys take transformers' value, null takes ``if_null``."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._raw = raw
        self._defaults = defaults

    def get(self, key: str) -> Any:
        """The value, or None where there is none; a list of equal numbers counts as that number."""
        for name in (key, _ALIASES.get(key, key)):
            if name in self._raw:
                value = self._raw[name]
                break
        else:
            value = self._defaults.get(key)
        if isinstance(value, list) and key != "eos_token_id":
            if not value or any(item != value[0] for item in value):
                raise UnsupportedModelError(
                    f"config.json: {key} is {_short(value)}; ernieq implements models with one value for all "
                    "experts"
                )
            return value[0]
        return value

    def integer(
        self, key: str, *, if_null: int | None = None, minimum: int = 1, maximum: int = _MAX_SIZE
    ) -> int:
        value = self.get(key)
        value = if_null if value is None else value
        if value is None:
            raise CheckpointError(f"config.json: {key} is missing; a whole number is needed")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise CheckpointError(
                f"config.json: {key} is {_short(value)}; a whole number from {minimum} to {maximum} is needed"
            )
        return value

    def number(self, key: str, if_null: float) -> float:
        value = self.get(key)
        return _positive(key, if_null if value is None else value)

    def flag(self, key: str, if_null: bool) -> bool:
        value = self.get(key)
        if value is None:
            return if_null
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {_short(value)}; true or false is needed")
        return value

    def tokens(self, key: str, if_absent: tuple[int, ...]) -> tuple[int, ...]:
        """Token ids given as a number or a list; null and -1 mean none."""
        value = self._raw.get(key, list(if_absent))
        ids = value if isinstance(value, list) else [value]
        for item in ids:
            if item is not None and (isinstance(item, bool) or not isinstance(item, int)):
                raise CheckpointError(f"config.json: {key} is {_short(value)}; a token id or a list is needed")
        return tuple(item for item in ids if item is not None and item >= 0)

    def token(self, key: str, if_absent: int) -> int | None:
        ids = self.tokens(key, (if_absent,))
        return ids[0] if ids else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {_short(value)}; a positive number is needed")
    return float(value)


def _model_type(raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures")
    named = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    model_type = raw.get("model_type")
    if model_type is None and named:
        model_type = _ARCHITECTURES.get(named[0])
    known = isinstance(model_type, str) and model_type in _DEFAULTS
    wrong = [name for name in named if _ARCHITECTURES.get(name) != model_type]
    if not known or wrong:
        found = wrong[0] if wrong else named[0] if named else raw.get("model_type")
        raise UnsupportedModelError(
            f"config.json describes the architecture {_short(found)} "
            f"(model_type {_short(raw.get('model_type'))}); ernieq "
            "implements Ernie4_5ForCausalLM (ernie4_5) and Ernie4_5_MoeForCausalLM (ernie4_5_moe)"
        )
    assert isinstance(model_type, str)
    return model_type


def _rope_theta(raw: Mapping[str, Any], keys: _Keys) -> float:
    """The base of the rotary angles; the one in an object of parameters goes first, as in transformers."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {name} is {_short(value)}; an object is needed")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind != "default":
        raise UnsupportedModelError(
            f"config.json: {name} asks for type {_short(kind)}; ernieq implements 'default'"
        )
    theta = value.get("rope_theta")
    return keys.number("rope_theta", _DEFAULT_THETA) if theta is None else _positive("rope_theta", theta)


def _activation(raw: Mapping[str, Any]) -> str:
    name = raw.get("hidden_act", "silu")
    if name != "silu":
        raise UnsupportedModelError(f"config.json: hidden_act is {_short(name)}; ernieq implements 'silu'")
    return "silu"


def _experts(keys: _Keys) -> dict[str, Any]:
    experts = keys.integer("moe_num_experts", if_null=64, minimum=0, maximum=_MAX_EXPERTS)
    layers = keys.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    if experts * layers > _MAX_ALL_EXPERTS:
        raise CheckpointError(
            f"config.json: {layers} layers of {experts} experts are {layers * experts} experts in all; at most "
            f"{_MAX_ALL_EXPERTS} are allowed"
        )
    end = keys.integer("moe_layer_end_index", if_null=-1, minimum=-1)
    chosen = keys.integer("moe_k", if_null=6, minimum=0)
    if experts and not 1 <= chosen <= experts:
        raise CheckpointError(
            f"config.json: moe_k is {chosen}; with {experts} experts 1 to {experts} is allowed"
        )
    return {
        "moe_num_experts": experts,
        "moe_k": chosen,
        "moe_intermediate_size": keys.integer("moe_intermediate_size", if_null=1536),
        "moe_num_shared_experts": keys.integer("moe_num_shared_experts", if_null=2, minimum=0),
        "moe_layer_start_index": keys.integer("moe_layer_start_index", if_null=1, minimum=0),
        "moe_layer_end_index": layers - 1 if end == -1 else end,
        "moe_layer_interval": keys.integer("moe_layer_interval", if_null=1),
        "moe_norm_min": keys.number("moe_norm_min", 1e-12),
    }


def _check_heads(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {config.num_attention_heads}; a multiple of "
            f"num_key_value_heads, {config.num_key_value_heads}, is needed"
        )
    if config.head_dim % 2:
        raise CheckpointError(
            f"config.json: head_dim is {config.head_dim}; an even number is needed, for its pairs are rotated"
        )
