"""``ernieq verify``: check a packed checkpoint to the last byte, and against its source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import click

from ernieq.bundled import resolve_source
from ernieq.checkpoint import Checkpoint, open_checkpoint
from ernieq.cli.shared import (
    backend_option,
    json_option,
    model_directory,
    print_json,
    progress_report,
    threads_option,
)
from ernieq.errors import CheckpointError, VerificationError
from ernieq.kernels.backend import Backend
from ernieq.model import ModelConfig, expected_parameters
from ernieq.pack import PackedReader, TensorError, VerifyReport, verify_packed
from ernieq.records import format_bytes, format_seconds, format_significant


@click.command("verify")
@click.argument("path")
@click.option(
    "--source",
    "base",
    metavar="BASE",
    help="Compare every tensor with BASE: a directory, a hub id, or bundled.",
)
@threads_option
@backend_option
@json_option
def command(path: str, base: str | None, threads: int, backend: Backend, as_json: bool) -> None:
    """Check the packed checkpoint PATH: hashes, shapes, finite scales, every source tensor accounted for.

    PATH is a directory or a hub id, which is fetched. Every byte is read once, and torch is not needed. With
    --source the relative error of every tensor is printed, kept tensors must be those of BASE to the last bit,
    and a matrix that is further off than its bits and a correction explain is refused. --threads and --backend
    say how matrices are decoded for that.

    \b
    Example:
      ernieq verify ernieq-nano-2bit
      ernieq verify ernieq-nano-2bit --source bundled
    """
    directory = model_directory(path)
    started = time.monotonic()
    reader = PackedReader(directory)
    source = None if base is None else _open_source(base)
    with progress_report("verify", unit="bytes") as report:
        found = verify_packed(
            reader,
            expected_shapes=expected_shapes(reader),
            source=source,
            backend=backend,
            threads=threads,
            on_progress=report.update,
        )
        seconds = time.monotonic() - started
        rate = format_bytes(round(found.shard_bytes / max(seconds, 1e-9)))
        report.terminal_line(f"{format_bytes(found.shard_bytes)} in {format_seconds(seconds)}, {rate}/s")
    if as_json:
        print_json({**asdict(found), "seconds": round(seconds, 3)})
        return
    if found.errors is not None:
        _print_errors(found.errors)
    click.echo(_sentence(found, base))


def _open_source(base: str) -> Checkpoint:
    return open_checkpoint(resolve_source(base))


def expected_shapes(reader: PackedReader) -> dict[str, tuple[int, ...]]:
    """Shapes that the model of this configuration calls for."""
    try:
        config = ModelConfig.from_dict(reader.config)
    except CheckpointError as error:
        raise VerificationError(f"{reader.path}: {error}") from None
    return {name: spec.shape for name, spec in expected_parameters(config).items()}


def _print_errors(errors: Sequence[TensorError]) -> None:
    """A line per tensor, then one per number of bits."""
    by_bits: dict[float, list[float]] = {}
    for error in errors:
        how = error.fate if error.bits is None else f"{error.bits:g} bits"
        mark = "  flagged" if error.flagged else ""
        click.echo(f"{error.name}  {how}  relative error {format_significant(error.relative_error)}{mark}")
        if error.bits is not None:
            by_bits.setdefault(error.bits, []).append(error.relative_error)
    for bits, found in sorted(by_bits.items()):
        low, mean, high = (format_significant(x) for x in (min(found), sum(found) / len(found), max(found)))
        click.echo(f"{bits:g} bits: {len(found)} matrices, relative error {low} to {high}, mean {mean}")
    if flagged := sum(error.flagged for error in errors):
        click.echo(
            f"flagged: {flagged} off by more than twice what their bits cost, as a matrix is whose target was "
            "corrected toward the original's output"
        )


def _sentence(report: VerifyReport, base: str | None) -> str:
    shards = "1 shard" if report.shards == 1 else f"{report.shards} shards"
    compared = "" if base is None else f", and every tensor of {base} is there as it should be"
    return (
        f"{report.path} is whole: {report.quantized} quantized, {report.kept} kept, {report.tuned} tuned and "
        f"{report.carried} carried tensors in {shards} ({format_bytes(report.shard_bytes)}), "
        f"{report.files} copied files, format {report.format_version}; hashes, shapes, scales and coverage "
        f"hold{compared}."
    )
