"""Quantize from Hessians that ``ernieq calibrate`` has kept: no text, no streams, one layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ernieq.calibrate import (
    ATTENTION_CONTEXT,
    ATTENTION_INPUT,
    EXPERTS_HIDDEN,
    MLP_INPUT,
    LayerStatistics,
    hidden_of,
)
from ernieq.convert.layer import LayerReport, Sink, encode_group, linear_of
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.encode import EncodeOptions
from ernieq.errors import CheckpointError, StorageError
from ernieq.model import DecoderLayer, ModelConfig
from ernieq.pack import CalibrationRecord

SUMMARY_NAME = "calibration.json"


@dataclass(frozen=True)
class Group:
    """Matrices that read one input: their part, the input's name for the signs, the Hessian's name."""

    names: tuple[str, ...]
    part: Part
    signs: str
    gram: str


def layer_groups(config: ModelConfig, index: int) -> list[Group]:
    """The groups of a layer, in the order of the file format."""
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    groups = [
        Group(attention, Part.ATTENTION, ATTENTION_INPUT, ATTENTION_INPUT),
        Group(("self_attn.o_proj",), Part.ATTENTION, ATTENTION_CONTEXT, ATTENTION_CONTEXT),
    ]
    if not config.is_moe_layer(index):
        return groups + _mlp_groups("mlp", Part.DENSE_MLP, MLP_INPUT, hidden_of("mlp"), hidden_of("mlp"))
    for expert in range(config.moe_num_experts):
        path = f"mlp.experts.{expert}"
        groups += _mlp_groups(path, Part.ROUTED_EXPERTS, f"{path}.input", EXPERTS_HIDDEN, f"{path}.hidden")
    if config.moe_num_shared_experts:
        path = "mlp.shared_experts"
        groups += _mlp_groups(path, Part.SHARED_EXPERTS, MLP_INPUT, hidden_of(path), hidden_of(path))
    return groups


def _mlp_groups(path: str, part: Part, input_gram: str, hidden_signs: str, hidden_gram: str) -> list[Group]:
    return [
        Group((f"{path}.gate_proj", f"{path}.up_proj"), part, MLP_INPUT, input_gram),
        Group((f"{path}.down_proj",), part, hidden_signs, hidden_gram),
    ]


def quantize_layer_from(
    config: ModelConfig,
    index: int,
    layer: DecoderLayer,
    grams: Mapping[str, Tensor],
    recipe: Recipe,
    options: EncodeOptions,
    sink: Sink,
    on_weights: Callable[[int], None] | None = None,
) -> LayerReport:
    """Encode the matrices of a layer with the Hessians of the unquantized model.

    Raises:
        CheckpointError: a Hessian is missing or has another width.
    """
    report = LayerReport(index)
    for group in layer_groups(config, index):
        weights = {name: linear_of(layer, name).weight.data for name in group.names}
        if all(recipe.bits_of(f"model.layers.{index}.{name}", group.part) == KEEP for name in weights):
            continue
        width = next(iter(weights.values())).shape[1]
        gram = grams.get(group.gram)
        if gram is None or gram.shape != (width, width):
            raise CheckpointError(f"the Hessians of layer {index} hold no {group.gram} of width {width}")
        encode_group(report, weights, group.part, group.signs, gram, recipe, options, sink, on_weights)
    return report


class HessianDirectory:
    """The directory that ``ernieq calibrate --out`` writes and ``ernieq quantize --hessians`` reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write_layer(self, index: int, statistics: LayerStatistics) -> None:
        """Write one layer's Hessians.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            save_file({name: gram.contiguous() for name, gram in statistics.grams.items()}, self._file(index))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"can't write {self._file(index)}: {error}") from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``calibration.json`` last, so that a directory without it is known to be unfinished."""
        try:
            text = json.dumps(summary, indent=1) + "\n"
            (self._path / SUMMARY_NAME).write_text(text, encoding="utf-8")
        except OSError as error:
            raise StorageError(f"can't write {self._path / SUMMARY_NAME}: {error.strerror}") from error

    @property
    def record(self) -> CalibrationRecord:
        """Where the Hessians come from, from ``calibration.json``.

        Raises:
            CheckpointError: it is missing or not JSON.
        """
        try:
            summary = json.loads((self._path / SUMMARY_NAME).read_text(encoding="utf-8"))
            return CalibrationRecord(**summary["calibration"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self._path} is no finished output of ernieq calibrate: it has no readable {SUMMARY_NAME}"
            ) from error

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Read one layer's Hessians.

        Raises:
            CheckpointError: the file is missing or malformed, or a Hessian is not finite.
        """
        try:
            with safe_open(self._file(index), framework="pt") as file:
                grams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the Hessians {self._file(index)} can't be read: {error}") from error
        for name, gram in grams.items():
            if not torch.isfinite(gram).all():
                raise CheckpointError(f"{self._file(index)}: {name} has NaN or infinite numbers")
        return grams

    def _file(self, index: int) -> Path:
        return self._path / f"layer-{index:05d}.safetensors"
