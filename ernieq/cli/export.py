"""``ernieq export``: the decoded weights as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from ernieq.cli.shared import (
    backend_option,
    model_directory,
    overwrite_option,
    progress_report,
    threads_option,
)
from ernieq.errors import FormatError
from ernieq.kernels.backend import Backend
from ernieq.pack import is_packed
from ernieq.records import format_bytes


@click.command("export")
@click.argument("path")
@click.option(
    "--to", "dtype", type=click.Choice(["bf16"]), default="bf16", show_default=True, help="Element type."
)
@click.option("--out", type=click.Path(path_type=Path), help="Directory to create.  [default: ./NAME-bf16]")
@overwrite_option
@threads_option
@backend_option
def command(path: str, dtype: str, out: Path | None, overwrite: bool, threads: int, backend: Backend) -> None:
    """Write the decoded weights of the packed checkpoint PATH, a directory or hub id, as an ordinary one.

    Any tool that reads the original model reads the result: it is the check that the packed form means what
    we say it means. It takes as much disk as the original.

    \b
    Example:
      ernieq export ernieq-nano-2bit --to bf16 --out ernieq-nano-2bit-decoded
    """
    from ernieq.convert.export import export_bf16

    directory = model_directory(path)
    if not is_packed(directory):
        raise FormatError(f"{path} is not a packed checkpoint; export decodes what quantize has written")
    out = out or Path(f"{Path(path).resolve().name}-{dtype}")
    with progress_report("decoding", unit="tensors") as report:
        written = export_bf16(
            directory,
            out,
            overwrite=overwrite,
            backend=backend,
            threads=threads,
            on_progress=report.update,
        )
    shards = "1 shard" if written.shards == 1 else f"{written.shards} shards"
    click.echo(
        f"{out}: {written.decoded} matrices decoded, {written.unchanged} tensors unchanged, "
        f"{format_bytes(written.nbytes)} in {shards}."
    )
