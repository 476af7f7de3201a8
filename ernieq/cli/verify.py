"""``ernieq verify``: check a packed checkpoint to the last byte."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ernieq.cli.shared import json_option, model_directory, print_json, progress_report
from ernieq.pack import PackedReader, VerifyReport, verify_packed
from ernieq.records import format_bytes


@click.command("verify")
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """Check the packed checkpoint PATH: hashes, shapes, finite scales, every source tensor accounted for.

    PATH is a directory or a hub id, which is fetched.

    \b
    Example:
      ernieq verify ernieq-nano-2bit
    """
    directory = model_directory(path)
    with progress_report("verify", unit="bytes") as report:
        found = verify_packed(
            directory,
            expected_shapes=expected_shapes(directory),
            on_progress=report.update,
        )
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(_sentence(found))


def expected_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes that the model of this configuration calls for."""
    from ernieq.model import ModelConfig, expected_parameters

    config = ModelConfig.from_dict(PackedReader(path).config)
    return {name: spec.shape for name, spec in expected_parameters(config).items()}


def _sentence(report: VerifyReport) -> str:
    shards = "1 shard" if report.shards == 1 else f"{report.shards} shards"
    return (
        f"{report.path} is whole: {report.quantized} quantized, {report.kept} kept, {report.tuned} tuned and "
        f"{report.carried} carried tensors in {shards} ({format_bytes(report.shard_bytes)}), "
        f"{report.files} copied files, format {report.format_version}; hashes, shapes, scales and coverage "
        "hold."
    )
