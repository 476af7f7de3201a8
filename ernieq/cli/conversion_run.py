"""The conversions of one ``ernieq quantize``: all of them from one source to one output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ernieq.calibrate import CalibrationSample, TextFile
from ernieq.checkpoint import Checkpoint
from ernieq.cli.shared import ProgressReport
from ernieq.convert import (
    Allocation,
    CalibrationSettings,
    Conversion,
    ConversionReport,
    HessianDirectory,
    LayerReport,
    Listener,
    Recipe,
    Staging,
    draw_sample,
)
from ernieq.encode import EncodeOptions
from ernieq.errors import InterruptedConversionError
from ernieq.report import model_card


@dataclass(frozen=True)
class ConversionRun:
    """Everything that a conversion needs but its recipe.

    Args:
        checkpoint: the source.
        name: how the user named it.
        out: directory to write.
        overwrite: whether an output of an earlier command may be replaced.
        calibration: texts, or Hessians that were collected before.
        options: how matrices are encoded.
        device: the CPU, or a GPU.
        vram_bytes: GPU memory that may be used.
        progress: where the user is told.
        staging: keeps finished work; None for a dry run, which converts nothing.
        should_stop: whether the user has asked to stop.
    """

    checkpoint: Checkpoint
    name: str
    out: Path
    overwrite: bool
    calibration: Sequence[TextFile] | HessianDirectory
    options: EncodeOptions
    device: torch.device
    vram_bytes: int | None
    progress: ProgressReport
    staging: Staging | None
    should_stop: Callable[[], bool]
    _drawn: dict[tuple[CalibrationSettings, int], CalibrationSample] = field(default_factory=dict, init=False)

    def sample(self, recipe: Recipe) -> CalibrationSample:
        """The calibration sample of a recipe; a text is tokenised once for all that ask.

        Raises:
            TextError: the text is shorter than one window.
        """
        assert not isinstance(self.calibration, HessianDirectory), "stored Hessians have no text"
        key = recipe.calibration, recipe.seed
        if key not in self._drawn:
            self._drawn[key] = draw_sample(self.checkpoint, self.calibration, recipe)
        return self._drawn[key]

    def check_stop(self) -> None:
        """Stop between two steps of work that is not saved.

        Raises:
            InterruptedConversionError: the user has asked for it.
        """
        if self.should_stop():
            raise InterruptedConversionError(f"stopped before anything of {self.out} was encoded")

    def conversion(self, recipe: Recipe, allocation: Allocation | None = None) -> Conversion:
        """A conversion by a recipe, or by the one of an allocation, which the manifest then tells of."""
        used = recipe if allocation is None else allocation.recipe
        return Conversion(
            self.checkpoint,
            self.name,
            used,
            self.calibration,
            self.options,
            self._listener(),
            device=self.device,
            vram_bytes=self.vram_bytes,
            allocation=None if allocation is None else allocation.to_json(),
            draw=lambda: self.sample(used),
        )

    def convert(
        self, recipe: Recipe, allocation: Allocation | None = None, *, again: bool = False
    ) -> ConversionReport:
        """Convert; ``again`` replaces what this command itself has written before."""
        conversion = self.conversion(recipe, allocation)
        self.progress.update("encoding", 0, conversion.plan.encoded_weights)
        used = recipe if allocation is None else allocation.recipe
        return conversion.run(
            self.out,
            overwrite=self.overwrite or again,
            card=lambda report: self._card(used, report),
            staging=self.staging,
            should_stop=self.should_stop,
        )

    def file_bytes(self) -> int:
        """Bytes of all shards of the output."""
        return sum(path.stat().st_size for path in self.out.glob("*.safetensors"))

    def _card(self, recipe: Recipe, report: ConversionReport) -> str:
        return model_card(
            name=self.out.name,
            base=self.name,
            recipe=recipe.to_dict(),
            parts=[dataclasses.asdict(part) for part in report.plan.parts],
            output_bytes=report.plan.output_bytes,
            bits_per_weight=report.plan.bits_per_weight,
        )

    def _listener(self) -> Listener:
        layers = self.checkpoint.config.num_hidden_layers

        def on_layer(report: LayerReport) -> None:
            errors = list(report.errors.values())
            mean = sum(errors) / len(errors) if errors else 0.0
            line = f"layer {report.index + 1}/{layers}: weight error {mean:.4f}, "
            line += f"output error {report.output_error:.4f}"
            if report.expert_tokens:
                line += f", tokens per expert {min(report.expert_tokens)} to {max(report.expert_tokens)}"
            self.progress.finished(line)
            for module, error in sorted(report.errors.items(), key=lambda item: -item[1]):
                self.progress.detail(f"  {module}: weight error {error:.4f}")

        def on_tuning_step(done: int, steps: int) -> None:
            self.progress.describe(f"tuning: step {done} of {steps}")

        return Listener(
            self.progress.describe, self.progress.advance, on_layer, on_tuning_step, self.progress.line
        )
