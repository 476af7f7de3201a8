"""What ``ernieq quantize`` prints: a plan, or the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ernieq.cli.allocation_options import print_allocation
from ernieq.cli.conversion_run import ConversionRun
from ernieq.cli.shared import print_json
from ernieq.convert import Allocation, ConversionReport, Plan, TuningReport
from ernieq.records import format_bytes, format_seconds


def tuning_sentence(report: TuningReport) -> str:
    """What tuning gained, in one line."""
    found = f"held-out divergence {report.before:.4f}"
    if not report.gained:
        return f"tuning: {found} was not lowered in {report.steps} steps; scales and norms stay as they were"
    return f"tuning: {found} -> {report.after:.4f} in {report.steps} steps"


def print_plan(
    plan: Plan, seconds: float, staged_bytes: int, out: Path, allocation: Allocation | None, *, as_json: bool
) -> None:
    """Print what ``--dry-run`` found."""
    if as_json:
        facts = dataclasses.asdict(plan) | {"out": str(out), "seconds": seconds}
        if allocation is not None:
            facts["allocation"] = allocation.to_json()
        print_json(facts | {"parameters": plan.parameters, "bits_per_weight": plan.bits_per_weight})
        return
    console = Console()
    console.print(plan_table(plan, out))
    if allocation is not None:
        print_allocation(allocation)
    console.print(needs_sentence(plan, seconds, staged_bytes), soft_wrap=True)


def plan_table(plan: Plan, out: Path) -> Table:
    """Parts of the model with their parameters, bits and bytes."""
    table = Table(title=f"Plan for {out}")
    for heading in ("part", "parameters", "bits", "bytes"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in plan.parts:
        table.add_row(part.part, f"{part.parameters:,}", f"{part.bits:.2f}", format_bytes(part.bytes))
    table.add_row(
        "total", f"{plan.parameters:,}", f"{plan.bits_per_weight:.2f}", format_bytes(plan.output_bytes)
    )
    return table


def needs_sentence(plan: Plan, seconds: float, staged_bytes: int) -> str:
    """What a conversion takes of the machine; ``staged_bytes`` of the disk only while it is at work."""
    disk = f"disk {format_bytes(plan.output_bytes)} and {format_bytes(staged_bytes)} more while it works"
    return f"memory about {format_bytes(plan.memory_bytes)}, {disk}, time about {format_seconds(seconds)}"


def print_result(
    run: ConversionRun, report: ConversionReport, seconds: float, kl: float | None, *, as_json: bool
) -> None:
    """Print what a conversion has written."""
    size = run.file_bytes()
    if as_json:
        facts = {
            "out": str(run.out),
            "bytes": size,
            "bits_per_weight": 8 * size / report.plan.parameters,
            "seconds": seconds,
            "calibration_tokens": report.calibration.tokens,
            "layers": [dataclasses.asdict(layer) for layer in report.layers],
            "tuning": None if report.tuning is None else dataclasses.asdict(report.tuning),
            "untuned": report.untuned,
        }
        print_json(facts if kl is None else facts | {"kl": kl})
        return
    click.echo(
        f"wrote {run.out}: {format_bytes(size)}, {8 * size / report.plan.parameters:.2f} bits per weight "
        f"over all parameters, in {format_seconds(seconds)}"
    )
