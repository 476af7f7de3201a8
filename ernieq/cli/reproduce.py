"""``ernieq reproduce``: run the conversion of a packed checkpoint again, and compare the bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
import torch

import ernieq
from ernieq.bundled import resolve_source
from ernieq.calibrate import TextFile
from ernieq.checkpoint import Checkpoint, open_checkpoint
from ernieq.cli.conversion_device import settle_conversion
from ernieq.cli.shared import (
    ProgressReport,
    backend_option,
    device_option,
    device_was_chosen,
    directories,
    json_option,
    model_directory,
    overwrite_option,
    print_json,
    progress_report,
    threads_option,
    vram_option,
)
from ernieq.convert import (
    FileMatch,
    HessianDirectory,
    Listener,
    Workplace,
    check_arithmetic,
    check_hessians,
    check_source,
    find_texts,
    made_on_gpu,
    match_packed,
    recorded_recipe,
    run_again,
)
from ernieq.encode import EncodeOptions
from ernieq.errors import CheckpointError, FormatError, OutputExistsError, ReproductionError
from ernieq.kernels.backend import Backend, processor_name
from ernieq.pack import Manifest, PackedReader


@click.command("reproduce")
@click.argument("path", shell_complete=directories)
@click.option(
    "--source",
    "base",
    metavar="BASE",
    help="The original, if it is not where the manifest says: a directory, a hub id, or bundled.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A calibration text that was used, found by its sha256; may be given again. Bundled texts and an own "
    "text beside PATH are found without.",
)
@click.option(
    "--hessians", type=click.Path(path_type=Path), help="The stored Hessians, if the conversion used some."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep the new checkpoint here.  [default: it is removed]"
)
@threads_option
@backend_option
@device_option
@vram_option
@overwrite_option
@json_option
def command(
    path: str,
    base: str | None,
    texts: tuple[Path, ...],
    hessians: Path | None,
    out: Path | None,
    threads: int,
    backend: Backend,
    device: torch.device,
    vram: float | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run the conversion that made the packed checkpoint PATH again, and say which shards match.

    Source, texts and Hessians must be those that the manifest names by their sha256. Bits that were allocated
    stand in its recipe, so nothing is measured again. What a CPU made needs a CPU, what a GPU made a GPU. Exits
    with 8 if a file differs.

    \b
    Examples:
      ernieq reproduce ernieq-nano-2bit
      ernieq reproduce ./my-2bit --source ./my-model --text notes.txt --out again
    """
    torch.set_num_threads(threads)
    directory = model_directory(path)
    reader = PackedReader(directory)
    manifest = reader.manifest
    if device_was_chosen() and not made_on_gpu(manifest):
        device = torch.device("cpu")
    device, vram_bytes = settle_conversion(device, vram, backend, quiet=True)
    check_arithmetic(manifest, device)
    recorded_recipe(manifest)  # say now if there is none
    if out is not None and out.exists() and not overwrite:
        raise OutputExistsError(f"the output {out} exists; pass --overwrite to replace it")
    with progress_report(f"reproducing {path}", unit="weights") as progress:
        calibration = _calibration(manifest, texts, hessians, directory.parent)
        with _source(manifest, base) as checkpoint:
            check_source(manifest, checkpoint)
            workplace = Workplace.on(device, vram_bytes or manifest.report.get("vram_bytes"))
            _tell_differences(manifest, workplace, progress)
            with _place(out, Path(path)) as place:
                listener = Listener(progress.describe, progress.advance)
                options = EncodeOptions(backend=backend, threads=threads)
                run_again(
                    manifest,
                    checkpoint,
                    calibration,
                    place,
                    options,
                    listener,
                    workplace=workplace,
                    overwrite=overwrite,
                )
                found = match_packed(reader, PackedReader(place))
    _conclude(path, found, as_json=as_json)


def _calibration(
    manifest: Manifest, texts: Sequence[Path], hessians: Path | None, beside: Path
) -> list[TextFile] | HessianDirectory:
    record = manifest.calibration
    if record is None:
        raise FormatError("its manifest names no calibration text, so there is nothing to run again")
    stored = check_hessians(record, None if hessians is None else HessianDirectory(hessians))
    return stored or find_texts(record, texts, beside)


@contextmanager
def _source(manifest: Manifest, base: str | None) -> Iterator[Checkpoint]:
    """The original, from where the user or the manifest says."""
    name, revision = base or manifest.source.name_or_path, None if base else manifest.source.revision
    try:
        checkpoint = open_checkpoint(resolve_source(name), revision=revision)
    except CheckpointError as error:
        hint = "" if base else " (the manifest names it; --source says where it lies now)"
        raise CheckpointError(f"the source {name} can't be opened{hint}: {error}") from error
    try:
        yield checkpoint
    finally:
        checkpoint.close()


@contextmanager
def _place(out: Path | None, packed: Path) -> Iterator[Path]:
    """Where the new checkpoint goes: ``--out``, or a folder beside PATH that is removed at the end."""
    if out is not None:
        yield out
        return
    beside = packed.resolve().parent if packed.is_dir() else Path.cwd()
    with tempfile.TemporaryDirectory(prefix=".ernieq-reproduce-", dir=beside) as folder:
        yield Path(folder) / packed.name


def _tell_differences(manifest: Manifest, workplace: Workplace, progress: ProgressReport) -> None:
    """Say what is other than when the checkpoint was made, where that may change its bytes."""
    facts = manifest.report
    pairs = [
        ("ernieq", manifest.ernieq_version, ernieq.__version__),
        ("torch", facts.get("torch"), str(torch.__version__)),
        ("device", facts.get("device"), workplace.name),
    ]
    if not workplace.is_gpu:
        pairs.append(("processor", facts.get("processor"), processor_name()))
    for what, before, now in pairs:
        if before is not None and before != now:
            progress.warn(f"{what}: made with {before}, run again with {now}: bytes may differ")


def _conclude(path: str, found: Sequence[FileMatch], *, as_json: bool) -> None:
    """Print the result.

    Raises:
        ReproductionError: a file differs.
    """
    differing = [match for match in found if not match.same]
    if as_json:
        print_json({"path": path, "same": not differing, "files": [asdict(match) for match in found]})
    else:
        for match in found:
            click.echo(f"{match.name}  {_words(match)}")
    if differing:
        raise ReproductionError(f"{len(differing)} of {len(found)} files of {path} differ when made again")
    if not as_json:
        click.echo(f"{path} is reproduced: all {len(found)} files have the same bytes")


def _words(match: FileMatch) -> str:
    if match.same or not match.tensors:
        return "same" if match.same else "differs"
    first = f", the first {', '.join(match.first)}" if match.first else ""
    return f"differs: {match.differing} of {match.tensors} tensors{first}"
