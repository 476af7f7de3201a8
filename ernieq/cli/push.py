"""``ernieq push``: a packed checkpoint to the Hugging Face hub, with its model card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ernieq.cli.shared import json_option, print_json, progress_report
from ernieq.cli.verify import expected_shapes
from ernieq.errors import FormatError
from ernieq.pack import PackedReader, verify_packed
from ernieq.pack.layout import CARD_NAME, CONFIG_NAME, MANIFEST_NAME
from ernieq.pack.shards import INDEX_NAME
from ernieq.records import format_bytes
from ernieq.report import card_for_hub


@click.command("push")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Only you (or your organisation) may see it.")
@click.option("--revision", help="Branch to commit to, made if there is none.  [default: main]")
@click.option(
    "--message", default="Upload a checkpoint packed by ernieq", show_default=True, help="Of the commit."
)
@json_option
def command(
    path: Path, repository: str, private: bool, revision: str | None, message: str, as_json: bool
) -> None:
    """Upload the packed checkpoint PATH to USER/NAME on the Hugging Face hub.

    It is verified first. Weights, tokenizer, manifest and model card are sent, nothing else of the directory.
    Log in with `hf auth login` or set HF_TOKEN.

    \b
    Example:
      ernieq push ernieq-nano-2bit my-name/ernieq-nano-2bit --private
    """
    from ernieq.checkpoint.hub_push import push_files, require_login

    names = _files(path)
    require_login()
    with progress_report("verify", unit="bytes") as report:
        reader = PackedReader(path)
        verify_packed(reader, expected_shapes=expected_shapes(reader), on_progress=report.update)
    nbytes = sum((path / name).stat().st_size for name in names)
    click.echo(f"sending {len(names)} files, {format_bytes(nbytes)}, to {repository}", err=True)
    card = card_for_hub((path / CARD_NAME).read_text(encoding="utf-8"), path.resolve().name, repository)
    pushed = push_files(
        path,
        names,
        repository,
        replaced={CARD_NAME: card.encode()},
        private=private,
        revision=revision,
        message=message,
    )
    if as_json:
        print_json({**asdict(pushed), "files": names, "nbytes": nbytes})
    else:
        click.echo(f"{pushed.repository}, {pushed.revision}, commit {pushed.commit}: {pushed.url}")


def _files(path: Path) -> list[str]:
    """What belongs to a packed checkpoint.

    Raises:
        FormatError: it is none, or has no model card.
    """
    reader = PackedReader(path)
    if not (path / CARD_NAME).is_file():
        raise FormatError(f"{path} has no model card, {CARD_NAME}; write one, or quantize again")
    index = [INDEX_NAME] if (path / INDEX_NAME).is_file() else []
    return sorted(
        [CARD_NAME, CONFIG_NAME, MANIFEST_NAME, *index, *reader.manifest.files, *reader.shard_files()]
    )
