"""Encode a whole model, layer by layer, going on from what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ernieq.calibrate import CalibrationSample, Streams, narrow_layer, stream_dtype
from ernieq.checkpoint import Checkpoint, load_embedding, load_final_norm, load_head
from ernieq.convert.collect import head_gram
from ernieq.convert.groups import EMBEDDING, HEAD, Group, GroupEncoder, LayerReport, Target, full_name
from ernieq.convert.journal import Journal
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.overlap import BackgroundQueue, read_layers
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.convert.snapshots import Mark, Snapshots
from ernieq.convert.stored import HessianDirectory, quantize_layer_from
from ernieq.convert.unit_store import UnitStore
from ernieq.convert.workplace import Workplace
from ernieq.encode import Batches, EncodeOptions
from ernieq.model import DecoderLayer, Rotary

_LAYER = "layer"


@dataclass(frozen=True)
class JobProgress:
    """Where finished work is kept, and who asks for a stop.

    Args:
        journal: what has been finished.
        units: encoded matrices.
        snapshots: hidden states between layers.
        queue: writes beside the work.
        check_stop: raises if the conversion is to stop.
    """

    journal: Journal
    units: UnitStore
    snapshots: Snapshots
    queue: BackgroundQueue
    check_stop: Callable[[], None]

    def finished_layers(self) -> dict[int, dict[str, Any]]:
        """Journalled layers, from the first up to the first that is missing or lacks a unit."""
        events = {event["index"]: event for event in self.journal.events(_LAYER)}
        found: dict[int, dict[str, Any]] = {}
        while (event := events.get(len(found))) and all(map(self.units.has, event["units"].values())):
            found[len(found)] = event
        return found

    def finish_layer(self, layer: LayerReport) -> None:
        """Journal a layer, once its units are."""
        names = [full_name(layer.index, name) for name in layer.errors]
        units, report = {name: self.units.used[name] for name in names}, dataclasses.asdict(layer)
        self.queue.submit(lambda: self.journal.append(_LAYER, index=layer.index, report=report, units=units))


class Encoding:
    """Encodes all matrices of a model.

    Args:
        checkpoint: the source.
        recipe: bits and settings.
        options: how matrices are encoded.
        workplace: the device that does the work.
        experts: how many experts are worked on at once.
        listener: told what happens.
        progress: has what was encoded before, and receives what is encoded now.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        options: EncodeOptions,
        workplace: Workplace,
        experts: Batches,
        listener: Listener,
        progress: JobProgress,
    ) -> None:
        self._checkpoint, self._recipe, self._options = checkpoint, recipe, options
        self._workplace, self._experts, self._listener, self._progress = workplace, experts, listener, progress
        self._encoder = GroupEncoder(recipe, options, progress.units, listener.on_weights)

    def along(self, sample: CalibrationSample, report: ConversionReport, before: int | None = None) -> None:
        """Encode layer by layer, each calibrated on the output of the quantized ones before it.

        Args:
            sample: calibration windows.
            report: filled in, in the order of the file.
            before: number of a layer that must be done again, because a unit of it is damaged.

        Raises:
            DamagedUnitError: as ``LayerQuantizer.run``.
        """
        config = self._checkpoint.config
        count = config.num_hidden_layers
        finished = self._progress.finished_layers()
        limit = Mark(len(finished), attended=True) if before is None else Mark(min(before, len(finished)))
        untied = not config.tie_word_embeddings
        if limit.layer == count and not (untied and HEAD not in self._progress.units.modules):
            begin, streams = Mark(count), None
        else:
            begin, streams = self._progress.snapshots.last(limit) or (Mark(0), None)
        if begin == Mark(0) or not self._take_alone(EMBEDDING, Part.EMBEDDING, report):
            looked_up = self._embed(sample, report)
            streams = looked_up if begin == Mark(0) else streams
        self._restore(report, [finished[index] for index in range(begin.layer)])
        if streams is None:
            if untied:
                self._take_alone(HEAD, Part.HEAD, report)
            return
        self._quantize(begin, self._workplace.place(streams), report)

    def stored(self, hessians: HessianDirectory, report: ConversionReport) -> None:
        """Encode layer by layer with the Hessians of the unquantized model."""
        config = self._checkpoint.config
        self._encode_embedding(report)
        for index, layer in self._layers(0):
            finished = quantize_layer_from(
                config,
                index,
                layer,
                hessians.read_layer(index),
                self._recipe,
                self._options,
                self._progress.units,
                self._listener.on_weights,
                self._experts,
            )
            self._finish_layer(report, finished)
        if not config.tie_word_embeddings:
            self._encode_head(None, report)

    def _quantize(self, begin: Mark, streams: Streams, report: ConversionReport) -> None:
        """Quantize what is beyond ``begin`` of the layers, and an untied head."""
        config = self._checkpoint.config
        read_on = config.num_hidden_layers - config.tie_word_embeddings  # layers whose output is read again
        cosine, sine = Rotary(config).angles(torch.arange(streams.shape[1]))
        rotary = cosine.to(streams.device), sine.to(streams.device)
        quantizer = LayerQuantizer(config, self._recipe.encode, self._encoder, self._experts)
        for index, layer in self._layers(begin.layer):
            before = max(begin, Mark(index))
            done = quantizer.run(before, layer, streams, rotary, lambda mark: self._save(mark, streams))
            self._finish_layer(report, done)
            del layer
            if index < read_on:
                self._save(Mark(index + 1), streams)
            self._progress.check_stop()
        if not config.tie_word_embeddings:
            norm = load_final_norm(self._checkpoint).to(streams.device)
            self._encode_head(head_gram(norm, streams, streams.quantized), report)

    def _save(self, mark: Mark, streams: Streams) -> None:
        """Save the streams if it is time, once all that has gone into them is journalled."""
        if self._progress.snapshots.due(streams):
            self._progress.queue.wait()
            self._progress.snapshots.save(mark, streams)

    def _layers(self, first: int) -> Iterator[tuple[int, DecoderLayer]]:
        """Layers where the work is done: float32 on the CPU, as stored on a GPU."""
        layers, index = read_layers(self._checkpoint, self._workplace.device, first), first
        while True:
            self._listener.on_phase(f"layer {index}")
            layer = next(layers, None)
            if layer is None:
                return
            yield index, narrow_layer(layer, self._workplace.device) if self._workplace.is_gpu else layer
            del layer  # the largest thing in memory: not held while the next one is read
            index += 1

    def _finish_layer(self, report: ConversionReport, layer: LayerReport) -> None:
        self._progress.finish_layer(layer)
        report.add(layer)
        self._listener.on_layer(layer)

    def _restore(self, report: ConversionReport, events: list[dict[str, Any]]) -> None:
        """Report layers that an earlier run has finished."""
        for event in events:
            layer = LayerReport(**event["report"])
            report.add(layer)
            self._progress.units.used |= event["units"]
            self._listener.on_weights(sum(report.plan.module_weights[module] for module in event["units"]))

    def _take_alone(self, module: str, part: Part, report: ConversionReport) -> bool:
        """Report a matrix outside the layers that is there or kept; False if it has to be encoded."""
        if self._recipe.bits_of(module, part) == KEEP:
            return True
        units = self._progress.units.fetch([[module]])
        if units is None:
            return False
        report.errors |= units[0].errors
        self._listener.on_weights(report.plan.module_weights[module])
        return True

    def _embed(self, sample: CalibrationSample, report: ConversionReport) -> Streams:
        """Encode the embedding and look up all calibration tokens in both tables."""
        table, decoded = self._encode_embedding(report)
        dtype = stream_dtype(sample.tokens, table.shape[1])
        lookups = [nn.functional.embedding(sample.windows, rows).to(dtype) for rows in (table, decoded)]
        self._checkpoint.release()
        return Streams(lookups[0], lookups[1])

    def _encode_embedding(self, report: ConversionReport) -> tuple[Tensor, Tensor]:
        """Encode the embedding; returns the source's table and the decoded one."""
        self._listener.on_phase("embedding")
        table = load_embedding(self._checkpoint).weight.data
        return table, self._encode_alone(EMBEDDING, Part.EMBEDDING, table, None, report)

    def _encode_head(self, gram: Tensor | None, report: ConversionReport) -> None:
        self._listener.on_phase("head")
        self._encode_alone(HEAD, Part.HEAD, load_head(self._checkpoint).weight.data, gram, report)

    def _encode_alone(
        self, module: str, part: Part, weight: Tensor, gram: Tensor | None, report: ConversionReport
    ) -> Tensor:
        """Encode a matrix outside the layers, unless it is kept; returns what it decodes to."""
        gram = torch.eye(weight.shape[1], device=self._workplace.device) if gram is None else gram
        weights = {module: weight}
        group = Group(weights, part, f"{module}.input", gram.device)
        encoded = self._encoder.encode(None, [group], lambda: [Target(weights, gram)])
        if module not in encoded:
            return weight
        report.errors[module] = encoded[module].proxy_error
        return encoded[module].decoded
