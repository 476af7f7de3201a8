"""Collect Hessians into a directory, layer by layer, going on from what an earlier run has left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ernieq.calibrate import CalibrationSample, LayerStatistics, Streams
from ernieq.checkpoint import Checkpoint
from ernieq.convert.collect import collect_statistics
from ernieq.convert.identity import Identity, job_identity
from ernieq.convert.mishaps import mishaps_told
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.recipe import Recipe
from ernieq.convert.resume import begin_job, describe_job, same_job
from ernieq.convert.snapshots import Mark, Snapshots
from ernieq.convert.staging import Staging
from ernieq.convert.stored import SUMMARY_NAME, HessianDirectory
from ernieq.convert.workplace import Workplace
from ernieq.errors import InterruptedConversionError

_HESSIANS = "hessians"


@dataclass(frozen=True)
class HessianJob:
    """A collection of Hessians.

    Args:
        checkpoint: the source.
        recipe: settings of the sample, seed and shrinkage.
        texts: ``text_identity`` of the calibration texts.
        workplace: the device that does the work.
        staging: staging directory of the output, entered.
        on_line: receives sentences for the user.
        should_stop: asked after every layer.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    texts: Identity
    workplace: Workplace
    staging: Staging
    on_line: Callable[[str], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False

    def collect(
        self,
        sample: CalibrationSample,
        on_layer: Callable[[int], None],
        on_notice: Callable[[str], None],
        summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Collect what is missing and publish the directory.

        Args:
            sample: calibration windows.
            on_layer: called with the number of every finished layer.
            on_notice: receives a sentence when GPU memory has run out and less is done at a time.
            summary: makes the contents of ``calibration.json`` from those of the layers.

        Returns:
            The summary.

        Raises:
            InterruptedConversionError: it was asked to stop; the same call goes on with what is finished.
            JobDiffersError: ``<out>.partial`` is of something else.
        """
        shards = self.checkpoint.shard_files()
        identity = job_identity(self.checkpoint, self.recipe, self.texts, self.workplace)
        vram = self.workplace.vram_bytes
        job = describe_job({"kind": {"of work": "calibration"}, **identity}, shards, vram_bytes=vram)
        if self.staging.published and same_job(self.staging, job):
            return HessianDirectory(self.staging.out).read_summary()
        kept = begin_job(self.staging, job, shards, self.on_line)
        workplace = replace(self.workplace, vram_bytes=kept["vram_bytes"])
        with mishaps_told(self._kept), BackgroundQueue() as queue:
            folder = self.staging.folder(_HESSIANS)
            self._missing_layers(HessianDirectory(folder), sample, workplace, queue, on_layer, on_notice)
            layers = self._finished()
            facts = summary([layers[index] for index in sorted(layers)])
            self.staging.announce(HessianDirectory(folder).write_summary(facts), SUMMARY_NAME)
            self.staging.publish(folder)
        return facts

    def _kept(self) -> str:
        """What is finished, and where; empty if nothing is."""
        done, count = len(self._finished()), self.checkpoint.config.num_hidden_layers
        return f"{done} of {count} layers are finished, kept in {self.staging.path}" if done else ""

    def _missing_layers(
        self,
        directory: HessianDirectory,
        sample: CalibrationSample,
        workplace: Workplace,
        queue: BackgroundQueue,
        on_layer: Callable[[int], None],
        on_notice: Callable[[str], None],
    ) -> None:
        count = self.checkpoint.config.num_hidden_layers
        finished, done = self._finished(), 0
        state = self.staging.folder("state")
        snapshots = Snapshots(state, self.staging.journal, queue, interrupted=bool(finished))
        while done in finished and directory.has_layer(done):
            done += 1
        if done:
            self.on_line(f"resuming from {self.staging.path}: {done} of {count} layers are finished")
        saved = snapshots.last(Mark(done))
        begin = (saved[0].layer, saved[1]) if saved else None
        for index in range(count if done == count else begin[0] if begin else 0):
            on_layer(index)
        if done == count:
            return

        def keep(index: int, statistics: LayerStatistics) -> None:
            digest = directory.write_layer(index, statistics)
            tokens, trust = statistics.expert_tokens, statistics.expert_trust
            layer = {"index": index, "expert_tokens": tokens, "expert_trust": trust, "sha256": digest}
            self.staging.journal.append(_HESSIANS, layer=layer)
            on_layer(index)

        def on_streams(index: int, streams: Streams) -> None:
            if snapshots.due(streams):
                snapshots.save(Mark(index), streams)
            if self.should_stop():
                raise InterruptedConversionError(
                    f"stopped: {index} of {count} layers are finished, kept in {self.staging.path}"
                )

        shrinkage = self.recipe.encode.shrinkage
        collect_statistics(self.checkpoint, sample, shrinkage, keep, workplace, on_notice, begin, on_streams)

    def _finished(self) -> dict[int, dict[str, Any]]:
        """Journalled layers by number."""
        events = self.staging.journal.events(_HESSIANS)
        return {event["layer"]["index"]: event["layer"] for event in events}
