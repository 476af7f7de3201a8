"""Before ``quantize`` begins its work: what can't end well is refused, what will be done is printed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ernieq.cli.allocating import Allocated
from ernieq.cli.conversion_output import needs_sentence, plan_table, print_plan
from ernieq.cli.conversion_run import ConversionRun
from ernieq.convert import (
    Allocation,
    Estimate,
    HessianDirectory,
    Plan,
    Recipe,
    SourceScan,
    audited_plan,
    check_preflight,
    coverage_sentence,
    estimate_time,
    keep_pace,
    remaining_seconds,
    sample_tokens,
    staged_bytes,
)
from ernieq.pack import PackedReader
from ernieq.records import format_bytes


@dataclass(frozen=True)
class Prepared:
    """A conversion that may begin.

    Args:
        run: everything but the recipe.
        recipe: of the user, or of the allocation.
        allocation: how the bits were chosen; None if the user did.
        plan: what will be written; its memory counts the measuring of an allocation too.
        untuned: why scales and norms will not be tuned; empty or None if that needs no saying.
        warnings: sentences of what is tight.
        measured_seconds: spent on an allocation.
    """

    run: ConversionRun
    recipe: Recipe
    allocation: Allocation | None
    plan: Plan
    untuned: str | None
    warnings: list[str]
    measured_seconds: float

    @property
    def staged_bytes(self) -> int:
        """Disk that is taken while the conversion works."""
        config, stored = self.run.checkpoint.config, isinstance(self.run.calibration, HessianDirectory)
        return staged_bytes(config, self.plan, 0 if stored else sample_tokens(config, self.recipe))

    def estimate(self) -> Estimate:
        """How long the conversion will take, from a probe of a few seconds.

        Raises:
            TextError: the calibration text is shorter than one window.
        """
        run = self.run
        windows = 0
        if not isinstance(run.calibration, HessianDirectory):
            windows = run.sample(self.recipe).windows.shape[0]
        return estimate_time(
            run.checkpoint.config,
            self.plan,
            self.recipe,
            run.options,
            run.device,
            windows=windows,
            tuned=self.untuned is None,
            source_bytes=sum(path.stat().st_size for path in run.checkpoint.shard_files()),
        )


def prepare(
    run: ConversionRun, recipe: Recipe, allocated: Allocated | None, measured_seconds: float
) -> Prepared:
    """Plan, and look whether the machine has what the plan needs.

    Raises:
        ErnieqError: as ``ernieq.convert.check_preflight``.
    """
    allocation = allocated.allocation if allocated else None
    conversion = run.conversion(recipe, allocation)
    used, plan = allocation.recipe if allocation else recipe, conversion.plan
    if allocated:
        needed = max(plan.memory_bytes, allocated.allocator.memory_bytes)
        plan = dataclasses.replace(plan, memory_bytes=needed)
    warnings = check_preflight(
        run.checkpoint,
        plan,
        used,
        run.out,
        overwrite=run.overwrite,
        calibrated=not isinstance(run.calibration, HessianDirectory),
        on_gpu=run.device.type == "cuda",
    )
    measured = measured_seconds if allocated else 0.0
    return Prepared(run, used, allocation, plan, conversion.untuned, warnings, measured)


def print_dry_run(prepared: Prepared, *, as_json: bool) -> None:
    """Print the plan of ``--dry-run``; a conversion measures for an allocation as well, so its time counts."""
    seconds = prepared.estimate().seconds + prepared.measured_seconds
    for line in [f"not tuned: {prepared.untuned}"] * bool(prepared.untuned) + prepared.warnings:
        prepared.run.progress.warn(line)
    print_plan(
        prepared.plan, seconds, prepared.staged_bytes, prepared.run.out, prepared.allocation, as_json=as_json
    )


def announce(prepared: Prepared, scan: SourceScan) -> None:
    """Say what is about to be done: on a terminal the whole plan, elsewhere one line."""
    progress, plan = prepared.run.progress, prepared.plan
    needs = needs_sentence(plan, _seconds_to_go(prepared), prepared.staged_bytes)
    for warning in prepared.warnings:
        progress.warn(warning)
    if not progress.on_terminal:
        size = f"{format_bytes(plan.output_bytes)} at {plan.bits_per_weight:.2f} bits per weight"
        progress.finished(f"plan: {size}, {needs}")
        return
    progress.line(scan.headers())
    progress.line(coverage_sentence(audited_plan(prepared.run.checkpoint, plan)))
    progress.table(plan_table(plan, prepared.run.out))
    progress.line(needs)


def _seconds_to_go(prepared: Prepared) -> float:
    """As measured, or what is left of what was measured by the run that this one goes on from."""
    run, staging = prepared.run, prepared.run.staging
    if staging is not None and (left := remaining_seconds(staging, prepared.plan, run.device)) is not None:
        return left
    run.progress.describe("measuring how fast this machine is")
    estimate = prepared.estimate()
    if staging is not None:
        keep_pace(staging, estimate, run.device)
    return estimate.seconds


def conclude(run: ConversionRun, scan: SourceScan) -> None:
    """Say what was read of the source, and what has become of its tensors."""
    run.progress.finished(scan.summary())
    coverage = PackedReader(run.out).manifest.coverage
    assert coverage is not None, "a manifest that was read has its coverage"
    # What the model does not know may be a misspelt name: that is told into a pipe, too.
    tell = run.progress.line if coverage.carried else run.progress.finished
    tell(coverage_sentence(coverage))
