"""Quantize from Hessians that ``ernieq calibrate`` has kept: no text, no streams, one layer at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ernieq.calibrate import (
    ATTENTION_CONTEXT,
    ATTENTION_INPUT,
    EXPERTS_HIDDEN,
    MLP_INPUT,
    LayerStatistics,
    hidden_of,
)
from ernieq.convert.groups import Group, GroupEncoder, LayerReport, Target, linear_of
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.convert.tensor_file import TensorFile, write_tensor_file
from ernieq.convert.unit_store import Units
from ernieq.encode import Batches, EncodeOptions, EncodingResult
from ernieq.errors import CheckpointError, FormatError
from ernieq.model import DecoderLayer, ModelConfig
from ernieq.pack import CalibrationRecord, RawTensor, file_sha256, little_endian_bytes, write_durably
from ernieq.pack.manifest import read_calibration
from ernieq.untrusted import open_regular, read_json_object

SUMMARY_NAME = "calibration.json"
_MOST_SUMMARY_BYTES = 1 << 24

_WithGram = tuple[Group, Tensor]  # a group, and the Hessian of its input


@dataclass(frozen=True)
class StoredGroup:
    """Matrices that read one input: their part, the input's name for the signs, the Hessian's name."""

    names: tuple[str, ...]
    part: Part
    signs: str
    gram: str


def layer_groups(config: ModelConfig, index: int) -> list[StoredGroup]:
    """The groups of a layer, in the order of the file format."""
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    groups = [
        StoredGroup(attention, Part.ATTENTION, ATTENTION_INPUT, ATTENTION_INPUT),
        StoredGroup(("self_attn.o_proj",), Part.ATTENTION, ATTENTION_CONTEXT, ATTENTION_CONTEXT),
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


def _mlp_groups(
    path: str, part: Part, input_gram: str, hidden_signs: str, hidden_gram: str
) -> list[StoredGroup]:
    return [
        StoredGroup((f"{path}.gate_proj", f"{path}.up_proj"), part, MLP_INPUT, input_gram),
        StoredGroup((f"{path}.down_proj",), part, hidden_signs, hidden_gram),
    ]


def quantize_layer_from(
    config: ModelConfig,
    index: int,
    layer: DecoderLayer,
    grams: Mapping[str, Tensor],
    recipe: Recipe,
    options: EncodeOptions,
    units: Units,
    on_weights: Callable[[int], None] | None = None,
    experts: Batches | None = None,
) -> LayerReport:
    """Encode the matrices of a layer with the Hessians of the unquantized model, on the device of the layer.

    Args:
        config: the model's configuration.
        index: number of the layer.
        layer: the layer.
        grams: the Hessians of the layer's inputs, by the names of ``layer_groups``.
        recipe: bits and seed.
        options: how matrices are encoded.
        units: has what was encoded before, and receives what is encoded now.
        on_weights: called with the number of weights encoded since the last call.
        experts: how many experts are worked on at once; one by one unless given.

    Raises:
        CheckpointError: a Hessian is missing or has another width.
    """
    report = LayerReport(index)
    encoder = GroupEncoder(recipe, options, units, on_weights)
    routed: list[list[_WithGram]] = []  # gate and up, and down, of every expert

    def encode(members: Sequence[_WithGram]) -> dict[str, EncodingResult]:
        groups = [group for group, _ in members]
        return encoder.encode(
            index, groups, lambda: [Target(group.weights, gram.to(group.worker)) for group, gram in members]
        )

    def encode_routed(batch: Sequence[list[_WithGram]]) -> None:
        encoded = encode([member for pair in batch for member in pair])
        for pair in batch:
            names = [name for group, _ in pair for name in group.weights if name in encoded]
            report.note({name: encoded[name] for name in names})

    def encode_gathered() -> None:
        (experts or Batches(1, "experts", options.on_notice)).run(routed, encode_routed)
        routed.clear()

    for stored in layer_groups(config, index):
        member = _with_gram(stored, index, layer, grams, recipe)
        if member is not None and stored.part == Part.ROUTED_EXPERTS:
            if not routed or _expert_of(routed[-1][-1]) != _expert_of(member):
                routed.append([])
            routed[-1].append(member)
            continue
        encode_gathered()
        if member is not None:
            report.note(encode([member]))
    encode_gathered()
    return report


def _with_gram(
    stored: StoredGroup, index: int, layer: DecoderLayer, grams: Mapping[str, Tensor], recipe: Recipe
) -> _WithGram | None:
    """A group and its Hessian; None if the recipe keeps all of it."""
    weights = {name: linear_of(layer, name).weight.data for name in stored.names}
    if all(recipe.bits_of(f"model.layers.{index}.{name}", stored.part) == KEEP for name in weights):
        return None
    width = next(iter(weights.values())).shape[1]
    gram = grams.get(stored.gram)
    if gram is None or gram.shape != (width, width):
        raise CheckpointError(f"the Hessians of layer {index} hold no {stored.gram} of width {width}")
    return Group(weights, stored.part, stored.signs, layer.input_layernorm.weight.device), gram


def _expert_of(member: _WithGram) -> str:
    return next(iter(member[0].weights)).rpartition(".")[0]


class HessianDirectory:
    """The directory that ``ernieq calibrate --out`` writes and ``ernieq quantize --hessians`` reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write_layer(self, index: int, statistics: LayerStatistics) -> str:
        """Write one layer's Hessians.

        Returns:
            sha256 (hex) of the file.

        Raises:
            StorageError: the disk refuses.
        """
        grams = {name: gram.contiguous().numpy() for name, gram in statistics.grams.items()}
        raw = {name: RawTensor("F32", gram.shape, little_endian_bytes(gram)) for name, gram in grams.items()}
        return write_tensor_file(self._file(index), TensorFile(raw, {"layer": index}).chunks())

    def write_summary(self, summary: Mapping[str, Any]) -> str:
        """Write ``calibration.json`` last, so that a directory without it is known to be unfinished.

        Returns:
            sha256 (hex) of the file.

        Raises:
            StorageError: the disk refuses.
        """
        raw = (json.dumps(summary, indent=1) + "\n").encode("utf-8")
        write_durably(self._path / SUMMARY_NAME, [raw])
        return hashlib.sha256(raw).hexdigest()

    def read_summary(self) -> dict[str, Any]:
        """The contents of ``calibration.json``.

        Raises:
            CheckpointError: it is missing or not JSON.
        """
        try:
            return read_json_object(self._path / SUMMARY_NAME, _MOST_SUMMARY_BYTES, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(f"{self._unfinished} ({error})") from error

    def has_layer(self, index: int) -> bool:
        """Whether there is a file of that layer."""
        return self._file(index).is_file()

    @property
    def record(self) -> CalibrationRecord:
        """Where the Hessians come from, from ``calibration.json``, and what their files hash to.

        Raises:
            CheckpointError: it is missing or not JSON.
        """
        try:
            found = read_calibration(self.read_summary(), str(self._path / SUMMARY_NAME))
        except FormatError as error:
            raise CheckpointError(f"{self._unfinished} ({error})") from error
        return replace(found, hessians=self.digests())

    @property
    def identity(self) -> dict[str, str]:
        """What tells these Hessians from others: the hash of ``calibration.json``, which has the layers'.

        Raises:
            CheckpointError: it is missing.
        """
        try:
            raw = (self._path / SUMMARY_NAME).read_bytes()
        except OSError:
            raise CheckpointError(self._unfinished) from None
        return {"Hessians": hashlib.sha256(raw).hexdigest()}

    @property
    def path(self) -> Path:
        """The directory."""
        return self._path

    def files(self) -> dict[str, Path]:
        """The files of all layers, by name."""
        return {path.name: path for path in sorted(self._path.glob("layer-*.safetensors"))}

    def digests(self) -> dict[str, str]:
        """sha256 (hex) of the files of all layers, by name: every byte is read.

        Raises:
            CheckpointError: one can't be read.
        """
        for path in self.files().values():
            open_regular(path, CheckpointError).close()  # a pipe would be waited for
        return {name: file_sha256(path) for name, path in self.files().items()}

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """Read one layer's Hessians.

        Raises:
            CheckpointError: the file is missing or malformed, or a Hessian is not finite.
        """
        open_regular(self._file(index), CheckpointError).close()  # the library would wait for a pipe
        try:
            with safe_open(self._file(index), framework="pt") as file:
                grams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the Hessians {self._file(index)} can't be read: {error}") from error
        for name, gram in grams.items():
            if not torch.isfinite(gram).all():
                raise CheckpointError(f"{self._file(index)}: {name} has NaN or infinite numbers")
        return grams

    @property
    def _unfinished(self) -> str:
        return f"{self._path} is no finished output of ernieq calibrate: it has no readable {SUMMARY_NAME}"

    def _file(self, index: int) -> Path:
        return self._path / f"layer-{index:05d}.safetensors"
