"""The conversion: an ERNIE 4.5 checkpoint in, a packed one out, one decoder layer in memory at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ernieq
from ernieq.calibrate import CalibrationSample, Streams, TextFile, narrow_layer, stream_dtype
from ernieq.checkpoint import (
    Checkpoint,
    load_embedding,
    load_final_norm,
    load_head,
)
from ernieq.convert.audit import audited
from ernieq.convert.collect import calibration_record, draw_sample, head_gram
from ernieq.convert.groups import EMBEDDING, HEAD, LayerReport
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.output import check_output
from ernieq.convert.overlap import BackgroundSink, Sink, read_layers
from ernieq.convert.plan import make_plan
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.convert.rest import keep_rest, planned_coverage
from ernieq.convert.stored import HessianDirectory, quantize_layer_from
from ernieq.convert.tune import HeldMatrices, refusal, tune_model
from ernieq.convert.workplace import Workplace
from ernieq.encode import EncodeOptions, encode_matrices, input_signs
from ernieq.model import DecoderLayer, Rotary
from ernieq.pack import Manifest, PackedWriter, Source, file_sha256
from ernieq.trellis import TrellisCode

CPU = torch.device("cpu")


class Conversion:
    """One run of ``ernieq quantize``.

    Args:
        checkpoint: the source.
        source_name: how the user named it; written into the manifest, so that a check finds its base.
        recipe: bits and settings.
        calibration: texts to calibrate on, or the Hessians that were collected before.
        options: how matrices are encoded.
        listener: told what happens.
        device: the CPU, or the GPU that is to do the work.
        vram_bytes: GPU memory that may be used; 90 % of what is free by default.
        allocation: how the bits were chosen, for the manifest; None if the user did.

    Raises:
        CheckpointError, RecipeError: the plan can't be made.
        BackendUnavailableError: the GPU has less memory free than it is to use.

    Attributes:
        plan: what will be written.
        untuned: why scales and norms will not be tuned, empty if nobody asked for it; None if they will be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        source_name: str,
        recipe: Recipe,
        calibration: Sequence[TextFile] | HessianDirectory,
        options: EncodeOptions,
        listener: Listener | None = None,
        device: torch.device = CPU,
        vram_bytes: int | None = None,
        allocation: Mapping[str, Any] | None = None,
    ) -> None:
        self._allocation = {} if allocation is None else {"allocation": dict(allocation)}
        self._checkpoint = checkpoint
        self._source_name = source_name
        self._recipe = recipe
        self._calibration = calibration
        self._listener = listener or Listener()
        self._workplace = Workplace.on(device, vram_bytes)
        config, tokens = checkpoint.config, self._streamed_tokens()
        self._options = dataclasses.replace(
            options,
            damping=recipe.encode.damping,
            first_pass_steps=recipe.encode.first_pass_steps,
            memory_bytes=self._workplace.encoding_bytes(config, tokens),
            on_notice=self._listener.on_phase,
        )
        self._experts = self._workplace.expert_batches(config, tokens, self._listener.on_phase)
        self.plan = make_plan(checkpoint, recipe)
        self._coverage = planned_coverage(checkpoint, self.plan.modules)
        self.untuned = self._why_untuned()

    def run(self, out: Path, *, overwrite: bool, card: Callable[[ConversionReport], str]) -> ConversionReport:
        """Convert.

        Args:
            out: directory to create.
            overwrite: whether an existing model directory may be replaced, once the new one is whole.
            card: writes the model card from the report.

        Raises:
            ErnieqError: anything from the tree; the input is untouched and no output is left.
        """
        started = time.monotonic()
        check_output(self._checkpoint, out, self.plan, overwrite=overwrite)
        load_final_norm(self._checkpoint)  # nothing of a tied model reads it: say now if it is not finite
        with torch.no_grad(), PackedWriter(out, overwrite=overwrite) as writer:
            sample = self._sample()
            if sample is not None and self.untuned is None:
                report = self._encode_and_tune(sample, writer)
            else:
                with self._workplace.limited(), BackgroundSink(writer) as sink:
                    report = self._encode(sample, sink)
                self._coverage = keep_rest(self._checkpoint, self._coverage, writer, {})
                report.untuned = self.untuned or ""
            for path in self._checkpoint.aux_files():
                writer.copy_file(path)
            self._listener.on_phase("writing and verifying")
            manifest = self._manifest(report, time.monotonic() - started)
            writer.finish(self._checkpoint.raw_config, manifest, card=card(report))
        return report

    def _why_untuned(self) -> str | None:
        """Why scales and norms are not tuned, empty if nobody asked for it; None if they are."""
        if not self._recipe.tune.enabled:
            return ""
        if isinstance(self._calibration, HessianDirectory):
            return "it needs the calibration text, and stored Hessians have none"
        return refusal(self.plan.parameters, self._workplace)

    def _sample(self) -> CalibrationSample | None:
        """Calibration windows; None with stored Hessians."""
        if isinstance(self._calibration, HessianDirectory):
            return None
        return draw_sample(self._checkpoint, self._calibration, self._recipe)

    def _encode_and_tune(self, sample: CalibrationSample, writer: PackedWriter) -> ConversionReport:
        """Encode everything, tune scales and norms, and only then hand over."""
        held = HeldMatrices()
        with self._workplace.limited():
            report = self._encode(sample, held)
            self._listener.on_phase("tuning scales and norms")
            tuned = tune_model(
                self._checkpoint,
                held.matrices,
                sample.windows,
                self._recipe,
                self._workplace,
                self._listener.on_tuning_step,
            )
        report.tuning, report.untuned = tuned.report, tuned.untuned
        for name, matrix in tuned.matrices.items():
            writer.add_encoded(name, matrix)
        self._coverage = keep_rest(self._checkpoint, self._coverage, writer, tuned.tensors)
        return report

    def _encode(self, sample: CalibrationSample | None, sink: Sink) -> ConversionReport:
        if sample is not None:
            report = ConversionReport(self.plan, calibration_record(sample))
            self._encode_along(sample, sink, report)
            return report
        assert isinstance(self._calibration, HessianDirectory)
        report = ConversionReport(self.plan, self._calibration.record)
        self._encode_from(self._calibration, sink, report)
        return report

    def _encode_along(self, sample: CalibrationSample, sink: Sink, report: ConversionReport) -> None:
        """Encode layer by layer, each calibrated on the output of the quantized ones before it."""
        config = self._checkpoint.config
        streams = self._workplace.place(self._embed(sample, sink, report))
        cosine, sine = Rotary(config).angles(torch.arange(streams.shape[1]))
        rotary = cosine.to(streams.device), sine.to(streams.device)
        quantizer = LayerQuantizer(
            config, self._recipe, self._options, sink, self._listener.on_weights, self._experts
        )
        for index, layer in enumerate(self._layers()):
            self._finish_layer(report, quantizer.run(index, layer, streams, rotary))
        if not config.tie_word_embeddings:
            norm = load_final_norm(self._checkpoint).to(streams.device)
            self._encode_head(sink, head_gram(norm, streams, streams.quantized), report)

    def _encode_from(self, stored: HessianDirectory, sink: Sink, report: ConversionReport) -> None:
        """Encode layer by layer with the Hessians of the unquantized model."""
        config = self._checkpoint.config
        self._encode_embedding(sink, report)
        for index, layer in enumerate(self._layers()):
            finished = quantize_layer_from(
                config,
                index,
                layer,
                stored.read_layer(index),
                self._recipe,
                self._options,
                sink,
                self._listener.on_weights,
                self._experts,
            )
            self._finish_layer(report, finished)
        if not config.tie_word_embeddings:
            self._encode_head(sink, None, report)

    def _layers(self) -> Iterator[DecoderLayer]:
        """Layers where the work is done: float32 on the CPU, as stored on a GPU."""
        layers, index = read_layers(self._checkpoint, self._workplace.device), 0
        while True:
            self._listener.on_phase(f"layer {index}")
            layer = next(layers, None)
            if layer is None:
                return
            yield narrow_layer(layer, self._workplace.device) if self._workplace.is_gpu else layer
            del layer  # the largest thing in memory: not held while the next one is read
            index += 1

    def _finish_layer(self, report: ConversionReport, layer: LayerReport) -> None:
        report.layers.append(layer)
        report.errors |= {f"model.layers.{layer.index}.{name}": error for name, error in layer.errors.items()}
        self._listener.on_layer(layer)

    def _streamed_tokens(self) -> int:
        """Calibration tokens whose hidden states are held; none with stored Hessians."""
        settings = self._recipe.calibration
        if isinstance(self._calibration, HessianDirectory):
            return 0
        return settings.windows * min(settings.window, self._checkpoint.config.max_position_embeddings)

    def _encode_embedding(self, sink: Sink, report: ConversionReport) -> tuple[Tensor, Tensor]:
        """Encode the embedding; returns the source's table and the decoded one."""
        self._listener.on_phase("embedding")
        table = load_embedding(self._checkpoint).weight.data
        return table, self._encode_alone(sink, report, EMBEDDING, Part.EMBEDDING, table, None)

    def _embed(self, sample: CalibrationSample, sink: Sink, report: ConversionReport) -> Streams:
        """Encode the embedding and look up all calibration tokens in both tables."""
        table, decoded = self._encode_embedding(sink, report)
        dtype = stream_dtype(sample.tokens, table.shape[1])
        lookups = [nn.functional.embedding(sample.windows, rows).to(dtype) for rows in (table, decoded)]
        self._checkpoint.release()
        return Streams(lookups[0], lookups[1])

    def _encode_head(self, sink: Sink, gram: Tensor | None, report: ConversionReport) -> None:
        self._listener.on_phase("head")
        weight = load_head(self._checkpoint).weight.data
        self._encode_alone(sink, report, HEAD, Part.HEAD, weight, gram)

    def _encode_alone(
        self,
        sink: Sink,
        report: ConversionReport,
        module: str,
        part: Part,
        weight: Tensor,
        gram: Tensor | None,
    ) -> Tensor:
        """Encode a matrix outside the layers, unless it is kept; returns what it decodes to."""
        bits = self._recipe.bits_of(module, part)
        if bits == KEEP:
            return weight
        width = weight.shape[1]
        code = TrellisCode(bits, self._recipe.encode.state_bits)
        signs = input_signs(self._recipe.seed, f"{module}.input", width)
        gram = torch.eye(width, device=self._workplace.device) if gram is None else gram
        result = encode_matrices({module: weight}, gram, signs, code, self._options, self._listener.on_weights)
        sink.add_encoded(module, result[module].encoded)
        report.errors[module] = result[module].proxy_error
        return result[module].decoded

    def _manifest(self, report: ConversionReport, seconds: float) -> Manifest:
        return Manifest(
            ernieq_version=ernieq.__version__,
            source=Source(
                self._source_name,
                self._checkpoint.revision,
                {path.name: file_sha256(path) for path in self._checkpoint.shard_files()},
            ),
            recipe=self._recipe.to_dict(),
            seed=self._recipe.seed,
            calibration=report.calibration,
            coverage=audited(self._checkpoint, self._coverage),
            report=report.to_json(self._workplace, seconds) | self._allocation,
        )
