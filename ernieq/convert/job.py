"""The conversion: an ERNIE 4.5 checkpoint in, a packed one out, one decoder layer in memory at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ernieq
from ernieq.calibrate import CalibrationSample, TextFile
from ernieq.checkpoint import Checkpoint, load_final_norm
from ernieq.convert.audit import audited
from ernieq.convert.collect import calibration_record, draw_sample
from ernieq.convert.encoding import Encoding, JobProgress
from ernieq.convert.groups import layer_of
from ernieq.convert.identity import digest_of, job_identity, text_identity
from ernieq.convert.kept_sample import sample_of_job
from ernieq.convert.listener import ConversionReport, Listener
from ernieq.convert.mishaps import mishaps_told
from ernieq.convert.output import check_output, check_place, missing_bytes
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.plan import make_plan, sample_tokens
from ernieq.convert.recipe import Recipe
from ernieq.convert.rest import keep_rest, planned_coverage
from ernieq.convert.resume import begin_job, describe_job, same_job
from ernieq.convert.snapshots import Snapshots
from ernieq.convert.source_hashes import SourceHashes
from ernieq.convert.staging import Staging
from ernieq.convert.stored import HessianDirectory
from ernieq.convert.tune import Tuned, refusal, tune_model
from ernieq.convert.unit_store import DamagedUnitError, UnitStore, journalled_modules
from ernieq.convert.workplace import Workplace
from ernieq.encode import EncodeOptions
from ernieq.errors import InterruptedConversionError
from ernieq.pack import Coverage, Manifest, PackedReader, PackedWriter, Source

CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Order:
    """Arguments of ``Conversion.run``, and when it was called (monotonic seconds)."""

    staging: Staging
    overwrite: bool
    card: Callable[[ConversionReport], str]
    should_stop: Callable[[], bool]
    started: float


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
        draw: draws the calibration sample, or has drawn it already; by default from the texts.

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
        draw: Callable[[], CalibrationSample] | None = None,
    ) -> None:
        self._allocation = {} if allocation is None else {"allocation": dict(allocation)}
        self._checkpoint = checkpoint
        self._source_name = source_name
        self._aux_files = checkpoint.aux_files()  # listed now: one that vanishes later must be missed
        self._recipe = recipe
        self._calibration, self._draw = calibration, draw
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

    def run(
        self,
        out: Path,
        *,
        overwrite: bool,
        card: Callable[[ConversionReport], str],
        staging: Staging | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ConversionReport:
        """Convert; what an earlier run of the same conversion has finished is taken from ``<out>.partial``.

        Args:
            out: directory to create.
            overwrite: whether an existing model directory may be replaced, once the new one is whole.
            card: writes the model card from the report.
            staging: that of ``out``, if the caller has entered it; the caller then removes it too.
            should_stop: asked after every unit of work.

        Raises:
            InterruptedConversionError: it was asked to stop; the same call goes on with what is finished.
            JobDiffersError: ``<out>.partial`` is of another conversion.
            OutputLockedError: another process is converting to the same output.
            ErnieqError: anything from the tree; the input is untouched, and no output is there.
        """
        started = time.monotonic()
        if staging is not None:
            return self._run(_Order(staging, overwrite, card, should_stop, started))
        check_place(self._checkpoint, out, overwrite=overwrite)
        with Staging(out) as own:
            report = self._run(_Order(own, overwrite, card, should_stop, started))
            own.remove()
        return report

    def _run(self, order: _Order) -> ConversionReport:
        staging, job = order.staging, self._job()
        if staging.published:
            if same_job(staging, job):
                self._listener.on_line(f"{staging.out} is finished already: removing {staging.path}")
                return ConversionReport.from_manifest(self.plan, PackedReader(staging.out).manifest)
            staging.discard_job()
        check_output(self._checkpoint, staging.out, self.plan, overwrite=order.overwrite, staging=staging.path)
        load_final_norm(self._checkpoint)  # nothing of a tied model reads it: say now if it is not finite
        self._begin(staging, job)
        with mishaps_told(lambda: self._kept(staging), lambda: missing_bytes(self.plan, staging.path)):
            return self._convert(order, digest_of(job["identity"]))

    def _convert(self, order: _Order, job: str) -> ConversionReport:
        """Encode and write; a matrix that the disk has lost in between is encoded again."""
        sample, journal = self._sample(order.staging), order.staging.journal
        source = SourceHashes(self._checkpoint.shard_files(), journal, self._checkpoint.check_unchanged)
        with torch.no_grad(), source as hashes, BackgroundQueue() as queue:
            progress = self._progress(order, job, queue)
            before: int | None = None
            while True:
                try:
                    report = self._encode(sample, progress, before)
                    self._write(order, report, sample, progress, hashes)
                except DamagedUnitError as damage:  # it was whole when it was written: the disk has lost it
                    before = layer_of(damage.module)
                    continue
                return report

    def _progress(self, order: _Order, job: str, queue: BackgroundQueue) -> JobProgress:
        """What is finished already, which the user is told, and where the rest will be kept."""
        staging, say = order.staging, self._listener.on_line

        def check_stop() -> None:
            if order.should_stop():
                raise InterruptedConversionError(
                    f"stopped: {self._share_of(units.modules)}, kept in {staging.path}"
                )

        units = UnitStore(staging.folder("units"), staging.journal, job, queue, say, check_stop)
        if units.modules:
            say(f"resuming from {staging.path}: {self._share_of(units.modules)}")
        interrupted = bool(units.modules)
        snapshots = Snapshots(staging.folder("state"), staging.journal, queue, interrupted=interrupted)
        return JobProgress(staging.journal, units, snapshots, queue, check_stop)

    def _job(self) -> dict[str, Any]:
        """Contents of ``job.json``."""
        given = self._calibration
        text = given.identity if isinstance(given, HessianDirectory) else text_identity(given)
        identity = job_identity(self._checkpoint, self._recipe, text, self._workplace)
        return describe_job(
            identity,
            self._checkpoint.shard_files(),
            experts_at_once=self._experts.size,
            encoding_bytes=self._options.memory_bytes,
            vram_bytes=self._workplace.vram_bytes,
        )

    def _begin(self, staging: Staging, job: dict[str, Any]) -> None:
        """Write ``job.json``, or go on with the job that is there: in batches of the same sizes."""
        kept = begin_job(staging, job, self._checkpoint.shard_files(), self._listener.on_line)
        self._experts.size = kept["experts_at_once"]
        self._options = dataclasses.replace(self._options, memory_bytes=kept["encoding_bytes"])
        self._workplace = dataclasses.replace(self._workplace, vram_bytes=kept["vram_bytes"])

    def _kept(self, staging: Staging) -> str:
        """What is finished, and where; empty if nothing is."""
        modules = journalled_modules(staging.journal)
        return f"{self._share_of(modules)}, kept in {staging.path}" if modules else ""

    def _share_of(self, modules: Iterable[str]) -> str:
        """How far the encoding is, in words."""
        done = sum(self.plan.module_weights.get(module, 0) for module in modules)
        return f"{100 * done / self.plan.encoded_weights:.0f} % of the weights are encoded"

    def _why_untuned(self) -> str | None:
        """Why scales and norms are not tuned, empty if nobody asked for it; None if they are."""
        if not self._recipe.tune.enabled:
            return ""
        if isinstance(self._calibration, HessianDirectory):
            return "it needs the calibration text, and stored Hessians have none"
        return refusal(self.plan.parameters, self._workplace)

    def _sample(self, staging: Staging) -> CalibrationSample | None:
        """Calibration windows; None with stored Hessians."""
        texts = self._calibration
        if isinstance(texts, HessianDirectory):
            return None
        draw = self._draw or (lambda: draw_sample(self._checkpoint, texts, self._recipe))
        return sample_of_job(staging, draw)

    def _encode(
        self, sample: CalibrationSample | None, progress: JobProgress, before: int | None
    ) -> ConversionReport:
        """Encode all matrices that are not encoded yet."""
        encoding = Encoding(
            self._checkpoint,
            self._recipe,
            self._options,
            self._workplace,
            self._experts,
            self._listener,
            progress,
        )
        with self._workplace.limited():
            if sample is not None:
                report = ConversionReport(self.plan, calibration_record(sample))
                encoding.along(sample, report, before)
            else:
                assert isinstance(self._calibration, HessianDirectory)
                report = ConversionReport(self.plan, self._calibration.record)
                encoding.stored(self._calibration, report)
        progress.queue.wait()
        return report

    def _write(
        self,
        order: _Order,
        report: ConversionReport,
        sample: CalibrationSample | None,
        progress: JobProgress,
        hashes: SourceHashes,
    ) -> None:
        """Tune, put the output together, verify and publish it.

        Raises:
            DamagedUnitError: a unit has to be encoded again.
        """
        staging, tuned = order.staging, self._tuned(report, sample, progress)
        self._listener.on_phase("writing and verifying")
        with PackedWriter(staging.out, overwrite=order.overwrite, staging=staging.path) as writer:
            for name in report.errors:
                writer.add_encoded(name, tuned.matrices[name] if tuned else progress.units.matrix(name))
                progress.check_stop()
            coverage = keep_rest(self._checkpoint, self._coverage, writer, tuned.tensors if tuned else {})
            for path in self._aux_files:
                writer.copy_file(path)
            seconds = max(0.0, time.monotonic() - order.started)
            manifest = self._manifest(report, coverage, hashes.result(), seconds)
            writer.finish(
                self._checkpoint.raw_config, manifest, card=order.card(report), on_verified=staging.announce
            )

    def _tuned(
        self, report: ConversionReport, sample: CalibrationSample | None, progress: JobProgress
    ) -> Tuned | None:
        """Tune scales and norms, holding all matrices; None if they are to stay as they are."""
        if sample is None or self.untuned is not None:
            report.untuned = self.untuned or ""
            return None
        matrices = {name: progress.units.matrix(name) for name in report.errors}

        def on_step(done: int, steps: int) -> None:
            self._listener.on_tuning_step(done, steps)
            progress.check_stop()

        self._listener.on_phase("tuning scales and norms")
        with self._workplace.limited():
            tuned = tune_model(
                self._checkpoint, matrices, sample.windows, self._recipe, self._workplace, on_step
            )
        report.tuning, report.untuned = tuned.report, tuned.untuned
        return tuned

    def _streamed_tokens(self) -> int:
        """Calibration tokens whose hidden states are held; none with stored Hessians."""
        stored = isinstance(self._calibration, HessianDirectory)
        return 0 if stored else sample_tokens(self._checkpoint.config, self._recipe)

    def _manifest(
        self, report: ConversionReport, coverage: Coverage, hashes: Mapping[str, str], seconds: float
    ) -> Manifest:
        return Manifest(
            ernieq_version=ernieq.__version__,
            source=Source(self._source_name, self._checkpoint.revision, hashes),
            recipe=self._recipe.to_dict(),
            seed=self._recipe.seed,
            calibration=report.calibration,
            coverage=audited(self._checkpoint, coverage),
            report=report.to_json(self._workplace, seconds) | self._allocation,
        )
