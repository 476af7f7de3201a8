"""``ernieq calibrate``: what a model's experts see of a text, and the Hessians for quantizing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import ernieq
from ernieq.bundled import BUNDLED_PREFIX, DEFAULT_MODEL, calibration_texts, resolve_source
from ernieq.calibrate import CalibrationSample, LayerStatistics, TextFile, read_text_file
from ernieq.checkpoint import Checkpoint, open_checkpoint
from ernieq.cli.conversion_device import settle_conversion
from ernieq.cli.shared import (
    ProgressReport,
    device_option,
    directories,
    json_option,
    overwrite_option,
    print_json,
    progress_report,
    restart_option,
    seed_option,
    text_option,
    threads_option,
    vram_option,
)
from ernieq.cli.stopping import stopping_gently
from ernieq.convert import (
    SUMMARY_NAME,
    HessianJob,
    Recipe,
    Staging,
    Workplace,
    apply_overrides,
    calibration_record,
    collect_statistics,
    default_recipe,
    draw_sample,
    staging_path,
    text_identity,
)
from ernieq.errors import OutputExistsError


def read_texts(paths: Sequence[Path]) -> list[TextFile]:
    """Read the user's calibration texts, or the bundled ones if none is named."""
    return [read_text_file(path) for path in paths or [text.path for text in calibration_texts()]]


@click.command(name="calibrate")
@click.argument("model", required=False, shell_complete=directories)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory for the Hessians, for quantize --hessians."
)
@text_option
@click.option("--windows", type=click.IntRange(min=1), help="Calibration windows.  [default: 64]")
@click.option("--window", type=click.IntRange(min=16), help="Tokens of a calibration window.  [default: 2048]")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@seed_option
@threads_option
@device_option
@vram_option
@overwrite_option
@restart_option
@json_option
def command(
    model: str | None,
    out: Path | None,
    texts: tuple[Path, ...],
    windows: int | None,
    window: int | None,
    revision: str | None,
    seed: int,
    threads: int,
    device: torch.device,
    vram: float | None,
    overwrite: bool,
    restart: bool,
    as_json: bool,
) -> None:
    """Run texts through MODEL and report how many tokens every expert sees.

    With --out the Hessians of all projections are kept, so that several recipes can be tried quickly. They take
    four bytes per squared channel: megabytes for a small model, tens of gigabytes for the 21B one. A run that
    was interrupted is resumed by the same command.

    \b
    Examples:
      ernieq calibrate
      ernieq calibrate ./my-model --text notes.txt --out my-model-hessians
    """
    torch.set_num_threads(threads)
    if out is not None:
        _check_place(out, overwrite=overwrite)
    name = model or BUNDLED_PREFIX + DEFAULT_MODEL
    raw = {key: value for key, value in (("windows", windows), ("window", window)) if value is not None}
    recipe = apply_overrides(default_recipe(2), {"seed": seed, "calibration": raw}, "options")
    workplace = Workplace.on(*settle_conversion(device, vram, quiet=as_json))
    checkpoint = open_checkpoint(resolve_source(name), revision=revision)
    read = read_texts(texts)
    sample = draw_sample(checkpoint, read, recipe)
    count = checkpoint.config.num_hidden_layers

    def summary_of(layers: list[dict[str, Any]]) -> dict[str, Any]:
        record = dataclasses.asdict(calibration_record(sample))
        program = {"ernieq_version": ernieq.__version__, "source": name}
        return {**program, "calibration": record, "layers": layers}

    with progress_report(f"calibrating {name}", total=count, unit="layers") as progress, ExitStack() as stack:
        if out is None:
            layers = _statistics(checkpoint, sample, recipe, workplace, progress)
            summary = summary_of(layers)
        else:
            staging = stack.enter_context(Staging(out, restart=restart))
            should_stop = stack.enter_context(stopping_gently())
            job = HessianJob(
                checkpoint, recipe, text_identity(read), workplace, staging, progress.line, should_stop
            )
            summary = job.collect(sample, lambda _: progress.advance(), progress.describe, summary_of)
            staging.remove()
    checkpoint.close()
    if as_json:
        print_json(summary)
    else:
        _print(summary, out)


def _check_place(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not overwrite and not staging_path(out.resolve()).exists():
        raise OutputExistsError(f"the output {out} exists; pass --overwrite to replace it")
    if out.is_dir() and any(out.iterdir()) and not (out / SUMMARY_NAME).is_file():
        raise OutputExistsError(f"{out} has no {SUMMARY_NAME}; only Hessians may be overwritten")


def _statistics(
    checkpoint: Checkpoint,
    sample: CalibrationSample,
    recipe: Recipe,
    workplace: Workplace,
    progress: ProgressReport,
) -> list[dict[str, Any]]:
    """What every layer's experts saw; the Hessians are not kept."""
    layers: list[dict[str, Any]] = []

    def on_layer(index: int, layer: LayerStatistics) -> None:
        layers.append(
            {"index": index, "expert_tokens": layer.expert_tokens, "expert_trust": layer.expert_trust}
        )
        progress.advance()

    shrinkage = recipe.encode.shrinkage
    collect_statistics(checkpoint, sample, shrinkage, on_layer, workplace, progress.describe)
    return layers


def _print(summary: dict[str, Any], out: Path | None) -> None:
    calibration = summary["calibration"]
    table = Table(
        title=f"{summary['source']}: {calibration['tokens']:,} tokens in {calibration['windows']} windows"
    )
    for heading in ("layer", "experts", "fewest tokens", "median", "most", "least trust in own Hessian"):
        table.add_column(heading, justify="right")
    for layer in summary["layers"]:
        tokens = sorted(layer["expert_tokens"])
        if tokens:
            figures = [f"{tokens[0]:,}", f"{tokens[len(tokens) // 2]:,}", f"{tokens[-1]:,}"]
            table.add_row(str(layer["index"]), str(len(tokens)), *figures, f"{min(layer['expert_trust']):.2f}")
        else:
            table.add_row(str(layer["index"]), "dense", "", "", "", "")
    console = Console()
    console.print(table)
    if out is not None:
        console.print(f"wrote the Hessians to {out}")
