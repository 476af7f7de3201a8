"""Names and orientation of an ERNIE 4.5 model in Paddle's files, set against those of Hugging Face.

Paddle stores a linear layer as (in, out), fuses q, k and v into ``qkv_proj`` and gate and up into
``up_gate_proj`` (gate first), and begins names with ``ernie.`` where Hugging Face has ``model.``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ernieq.model import ParameterSpec

_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj")
_MLP_PARTS = ("gate_proj", "up_proj")
_PREFIXES = ("ernie.", "model.")
_HEAD = "lm_head"


@dataclass(frozen=True)
class PaddlePlace:
    """Where a tensor of the Hugging Face model lies in Paddle's files.

    Args:
        module: Paddle's module, ``ernie.layers.3.mlp.experts.7.up_gate_proj``.
        leaf: last part of the name: ``weight``, ``bias``, ``e_score_correction_bias``.
        first: first output channel, in a fused module.
        rows: number of output channels, or the length of a vector.
        all_rows: output channels of the whole module.
    """

    module: str
    leaf: str
    first: int
    rows: int
    all_rows: int


def paddle_prefix(names: Collection[str]) -> str:
    """``ernie.`` or ``model.``: how names of the decoder begin here."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in names), _PREFIXES[0])


def paddle_places(name: str, specs: Mapping[str, ParameterSpec], prefix: str) -> list[PaddlePlace]:
    """Where a tensor may lie: in a module of its own, or in a fused one.

    Args:
        name: of the tensor in the Hugging Face model.
        specs: all tensors of that model.
        prefix: as `paddle_prefix` says.
    """
    rows = specs[name].shape[0]
    stem, leaf = name.rsplit(".", 1)
    parent, _, part = stem.rpartition(".")

    def module(stem: str) -> str:
        return stem if stem == _HEAD else prefix + stem.removeprefix("model.")

    places = [PaddlePlace(module(stem), leaf, 0, rows, rows)]
    for parts, fused in ((_ATTENTION_PARTS, "qkv_proj"), (_MLP_PARTS, "up_gate_proj")):
        if part in parts:
            widths = [specs[f"{parent}.{other}.{leaf}"].shape[0] for other in parts]
            before = sum(widths[: parts.index(part)])
            places.append(PaddlePlace(module(f"{parent}.{fused}"), leaf, before, rows, sum(widths)))
    return places
