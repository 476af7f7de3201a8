"""``ernieq import-wint2``: Baidu's 2-bit files, read into an ordinary or a packed checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click
import torch

from ernieq.checkpoint import FastDeployCheckpoint, InputOrder, open_fastdeploy
from ernieq.cli.calibrate import read_texts
from ernieq.cli.conversion_device import settle_conversion
from ernieq.cli.conversion_output import print_result
from ernieq.cli.conversion_run import ConversionRun
from ernieq.cli.shared import (
    ProgressReport,
    backend_option,
    device_option,
    json_option,
    overwrite_option,
    print_json,
    progress_report,
    restart_option,
    text_option,
    threads_option,
    vram_option,
)
from ernieq.cli.stopping import stopping_gently
from ernieq.convert import Recipe, Staging, apply_overrides, check_place, default_recipe
from ernieq.convert.plain_copy import write_plain
from ernieq.encode import EncodeOptions
from ernieq.errors import UsageError
from ernieq.kernels.backend import Backend
from ernieq.records import format_bytes

_BF16, _PACKED = "bf16", "packed"
_AUTO = "auto"


@click.command("import-wint2")
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--to",
    "kind",
    type=click.Choice([_BF16, _PACKED]),
    default=_BF16,
    show_default=True,
    help="An ordinary bf16 checkpoint, or one that is encoded again, a layer at a time.",
)
@click.option(
    "--bits", type=float, metavar="BITS", help="Bits of the routed experts with --to packed.  [default: 2]"
)
@click.option(
    "--input-order",
    type=click.Choice([_AUTO, *(order.value for order in InputOrder)]),
    default=_AUTO,
    show_default=True,
    help="Order of the inputs in the 2-bit matrices; auto lets the weights tell.",
)
@text_option
@click.option(
    "--windows", type=click.IntRange(min=1), help="Calibration windows for --to packed.  [default: 64]"
)
@click.option(
    "--state-bits",
    type=int,
    metavar="NUMBER",
    help="Length of the code's state for --to packed.  [default: 16]",
)
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@threads_option
@backend_option
@device_option
@vram_option
@overwrite_option
@restart_option
@json_option
def command(
    source: str,
    out: Path,
    kind: str,
    bits: float | None,
    input_order: str,
    texts: tuple[Path, ...],
    windows: int | None,
    state_bits: int | None,
    revision: str | None,
    threads: int,
    backend: Backend,
    device: torch.device,
    vram: float | None,
    overwrite: bool,
    restart: bool,
    as_json: bool,
) -> None:
    """Read SOURCE, a WINT2 checkpoint of FastDeploy, into one that PyTorch can read.

    SOURCE is a directory or a hub id. Baidu publishes its 300B model in this form: 2 bits for most routed
    experts, 4 for those of the first layers, 8 for the rest. Checkpoints cut into slices are not read.

    \b
    Example:
      ernieq import-wint2 baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle --out ernie-300b-bf16
    """
    encoding = {"--bits": bits, "--text": texts or None, "--windows": windows, "--state-bits": state_bits}
    for option, given in encoding.items():
        if given is not None and kind != _PACKED:
            raise UsageError(f"{option} means nothing without --to packed")
    recipe = _recipe(bits, windows, state_bits)
    torch.set_num_threads(threads)
    order = None if input_order == _AUTO else InputOrder(input_order)
    with progress_report(f"opening {source}", unit="tensors") as progress:
        checkpoint = open_fastdeploy(source, revision=revision, order=order, on_progress=progress.update)
        _tell(checkpoint, progress)
        if kind == _BF16:
            _write_bf16(checkpoint, out, overwrite, progress, as_json=as_json)
            return
        device, vram_bytes = settle_conversion(device, vram, backend, quiet=as_json)
        options = EncodeOptions(backend=backend, threads=threads)
        check_place(checkpoint, out, overwrite=overwrite)
        started = time.monotonic()
        with Staging(out, restart=restart) as staging, stopping_gently() as should_stop:
            run = ConversionRun(
                checkpoint,
                source,
                out,
                overwrite,
                read_texts(texts),
                options,
                device,
                vram_bytes,
                progress,
                staging,
                should_stop,
            )
            report = run.convert(recipe)
            staging.remove()
    print_result(run, report, time.monotonic() - started, None, as_json=as_json)


def _recipe(bits: float | None, windows: int | None, state_bits: int | None) -> Recipe:
    recipe = default_recipe(2 if bits is None else bits)
    given = {
        "calibration": {} if windows is None else {"windows": windows},
        "encode": {} if state_bits is None else {"state_bits": state_bits},
    }
    return apply_overrides(recipe, given, "options")


def _tell(checkpoint: FastDeployCheckpoint, progress: ProgressReport) -> None:
    counts = ", ".join(f"{count} {storage}" for storage, count in checkpoint.storage_counts().items())
    progress.line(f"stored tensors: {counts}; inputs in {checkpoint.order} order")
    if checkpoint.left_out:
        progress.line(f"left out: {len(checkpoint.left_out)} tensors of the multi-token head")


def _write_bf16(
    checkpoint: FastDeployCheckpoint, out: Path, overwrite: bool, progress: ProgressReport, *, as_json: bool
) -> None:
    written = write_plain(checkpoint, out, overwrite=overwrite, on_progress=progress.update)
    if as_json:
        counts = {storage.name.lower(): count for storage, count in checkpoint.storage_counts().items()}
        print_json({**asdict(written), "stored": counts, "input_order": checkpoint.order})
        return
    shards = "1 shard" if written.shards == 1 else f"{written.shards} shards"
    click.echo(f"{out}: {written.tensors} tensors, {format_bytes(written.nbytes)} in {shards}.")
