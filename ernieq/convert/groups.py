"""Encode groups of matrices, each with the Hessian of the input that they share; what is there is taken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.convert.unit_store import Unit, Units
from ernieq.encode import (
    EncodeOptions,
    EncodingResult,
    decode_stack,
    encode_batch,
    encode_matrices,
    input_signs,
)
from ernieq.errors import VerificationError
from ernieq.model import DecoderLayer
from ernieq.trellis import TrellisCode

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"


@dataclass
class LayerReport:
    """What happened in one layer.

    Args:
        index: number of the layer.
        errors: proxy error of every encoded matrix, by its name within the layer.
        expert_tokens: calibration tokens routed to every expert.
        expert_trust: weight of every expert's own Hessian against its layer's, 0 to 1.
        output_error: squared error of the layer's output against the bf16 model, relative to its power.
    """

    index: int
    errors: dict[str, float] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    expert_trust: list[float] = field(default_factory=list)
    output_error: float = 0.0

    def note(self, encoded: Mapping[str, EncodingResult]) -> None:
        """Note the errors of encoded matrices."""
        self.errors |= {name: result.proxy_error for name, result in encoded.items()}


@dataclass(frozen=True)
class Group:
    """Matrices that read one input.

    Args:
        weights: name within the layer -> (out_features, in_features), the source's.
        part: part of the model that they belong to.
        signs: name of their input within the layer, which decides the signs of the rotation.
        worker: the device that encodes and decodes.
    """

    weights: Mapping[str, Tensor]
    part: Part
    signs: str
    worker: torch.device


@dataclass(frozen=True)
class Target:
    """What the matrices of a group are to become.

    Args:
        weights: name within the layer -> (out_features, in_features).
        gram: (in_features, in_features) float32, mean of x x^T, on the device that works.
    """

    weights: Mapping[str, Tensor]
    gram: Tensor


@dataclass(frozen=True)
class _Job:
    """The matrices of a group that get the same bits; the group by its place among those that came with it."""

    place: int
    group: Group
    names: tuple[str, ...]
    bits: float

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """(out_features, in_features) of every matrix."""
        return tuple(self.group.weights[name].shape for name in self.names)

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind can be done together."""
        return self.bits, self.group.signs, self.shapes

    def weights(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """What the matrices are to become."""
        return {name: targets[self.place].weights[name] for name in self.names}


class Encoder(Protocol):
    """Encodes groups of matrices."""

    def encode(
        self, layer: int | None, groups: Sequence[Group], aim: Callable[[], Sequence[Target]]
    ) -> dict[str, EncodingResult]:
        """``GroupEncoder.encode``."""
        ...


class GroupEncoder:
    """Encodes groups of matrices, unless they have been encoded before.

    Args:
        recipe: bits and seed.
        options: how matrices are encoded.
        units: has what was encoded before, and receives what is encoded now.
        on_weights: called with the number of weights encoded since the last call.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: EncodeOptions,
        units: Units,
        on_weights: Callable[[int], None] | None = None,
    ) -> None:
        self._recipe = recipe
        self._options = options
        self._units = units
        self._on_weights = on_weights

    def encode(
        self, layer: int | None, groups: Sequence[Group], aim: Callable[[], Sequence[Target]]
    ) -> dict[str, EncodingResult]:
        """Encode groups of one layer, or of what is outside.

        A single group is encoded as the device does it best; of several, those that are alike go together.

        Args:
            layer: number of the layer; None outside.
            groups: what is to be encoded.
            aim: works out the target of every group, in their order; called once, and only if something is
                not there.

        Returns:
            Name within the layer -> result, without the matrices that the recipe keeps.
        """
        kinds: dict[tuple[object, ...], list[_Job]] = {}
        for place, group in enumerate(groups):
            for job in self._jobs(layer, place, group):
                kinds.setdefault(job.kind, []).append(job)
        encoded: dict[str, EncodingResult] = {}
        targets: Sequence[Target] | None = None
        for alike in kinds.values():
            found = self._taken(layer, alike)
            if found is None:
                targets = aim() if targets is None else targets
                found = self._encoded(layer, alike, targets)
            for results in found:
                encoded |= results
        return encoded

    def _jobs(self, layer: int | None, place: int, group: Group) -> list[_Job]:
        by_bits: dict[float, list[str]] = {}
        for name in group.weights:
            bits = self._recipe.bits_of(full_name(layer, name), group.part)
            if bits != KEEP:
                by_bits.setdefault(bits, []).append(name)
        return [_Job(place, group, tuple(names), bits) for bits, names in by_bits.items()]

    def _taken(self, layer: int | None, jobs: Sequence[_Job]) -> list[dict[str, EncodingResult]] | None:
        """Results of jobs that are alike from units that are there; None unless all of them are."""
        units = self._units.fetch([[full_name(layer, name) for name in job.names] for job in jobs])
        if units is None:
            return None
        results = [self._results(job, unit, len(jobs) == 1) for job, unit in zip(jobs, units, strict=True)]
        if self._on_weights is not None:
            self._on_weights(sum(shape.numel() for job in jobs for shape in job.shapes))
        return results

    def _encoded(
        self, layer: int | None, jobs: Sequence[_Job], targets: Sequence[Target]
    ) -> list[dict[str, EncodingResult]]:
        """Encode jobs that are alike and have the units kept."""
        results = self._encode_alike(layer, jobs, targets)
        units = [
            Unit(
                {full_name(layer, name): result.encoded for name, result in own.items()},
                {full_name(layer, name): result.proxy_error for name, result in own.items()},
            )
            for own in results
        ]

        def check(written: Sequence[Unit]) -> None:
            for job, unit, own in zip(jobs, written, results, strict=True):
                for name, again in self._results(job, unit, len(jobs) == 1).items():
                    if not torch.equal(again.decoded, own[name].decoded):
                        raise VerificationError(
                            f"{full_name(layer, name)} does not decode to the weights that its encoder meant"
                        )

        self._units.keep(units, check)
        return results

    def _results(self, job: _Job, unit: Unit, alone: bool) -> dict[str, EncodingResult]:
        """What the encoder returned when it made this unit."""
        worker = job.group.worker
        home = job.group.weights[job.names[0]].device if alone else worker
        decoded = decode_stack(unit.matrices, worker, home, self._options, alone=alone)
        return {
            name: EncodingResult(unit.matrices[full], decoded[full], unit.errors[full])
            for name, full in zip(job.names, unit.matrices, strict=True)
        }

    def _encode_alike(
        self, layer: int | None, jobs: Sequence[_Job], targets: Sequence[Target]
    ) -> list[dict[str, EncodingResult]]:
        code = TrellisCode(jobs[0].bits, self._recipe.encode.state_bits)
        signs = self._signs(layer, jobs[0])
        stacks = [job.weights(targets) for job in jobs]
        grams = [targets[job.place].gram for job in jobs]
        if len(jobs) == 1:
            return [encode_matrices(stacks[0], grams[0], signs, code, self._options, self._on_weights)]
        return encode_batch(stacks, grams, signs, code, self._options, self._on_weights)

    def _signs(self, layer: int | None, job: _Job) -> NDArray[np.int8]:
        return input_signs(self._recipe.seed, full_name(layer, job.group.signs), job.shapes[0][1])


def linear_of(layer: DecoderLayer, name: str) -> nn.Linear:
    """The plain linear of that name within a layer."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def full_name(layer: int | None, name: str) -> str:
    """Name within the model of a module of a layer, or of one outside."""
    return name if layer is None else f"model.layers.{layer}.{name}"


def layer_of(module: str) -> int:
    """Number of the layer that a module is in; 0 for the embedding, a number behind them all for the head."""
    parts = module.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else 0 if module == EMBEDDING else sys.maxsize
