"""``ernieq sample-text``: calibration text that the model writes itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ernieq.cli.shared import (
    ProgressReport,
    device_option,
    model_directory,
    overwrite_option,
    progress_report,
    seed_option,
    threads_option,
)
from ernieq.errors import BackendUnavailableError, OutputExistsError, StorageError

if TYPE_CHECKING:
    import torch

    from ernieq.convert import Recipe

DEFAULT_TOKENS = 1_000_000


@click.command("sample-text")
@click.argument("model")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A .jsonl to write, one document a line, for the --text of quantize and calibrate.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=DEFAULT_TOKENS, show_default=True, help="At least so many."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="What logits are divided by; 1 is the model's own distribution.",
)
@seed_option
@threads_option
@device_option
@overwrite_option
def command(
    model: str,
    out: Path,
    tokens: int,
    temperature: float,
    seed: int,
    threads: int,
    device: torch.device,
    overwrite: bool,
) -> None:
    """Let MODEL write text to calibrate on: a directory, a hub id or a bundled model.

    Text of the model's own is like that on which its weights are used, and it has not learnt it by heart. The
    whole model must fit in the memory of the device, in 16 bits on a GPU.

    \b
    Example:
      ernieq sample-text ./my-model --out own.jsonl
      ernieq quantize ./my-model --bits 2 --text own.jsonl --windows 460
    """
    import torch

    if out.exists() and not overwrite:
        raise OutputExistsError(f"the output {out} exists; pass --overwrite to replace it")
    torch.set_num_threads(threads)
    with progress_report("opening the model", unit="tokens") as progress:
        documents = write_own_text(
            model_directory(model), out, tokens, device, seed, progress, temperature=temperature
        )
    click.echo(f"wrote {out}: {documents:,} documents")


def write_own_text(
    directory: Path,
    out: Path,
    tokens: int,
    device: torch.device,
    seed: int,
    progress: ProgressReport,
    *,
    temperature: float = 1.0,
) -> int:
    """Write documents of the model in ``directory`` to ``out``, whole or not at all.

    Returns:
        How many documents there are.

    Raises:
        StorageError: the disk refuses.
        BackendUnavailableError: the GPU has too little memory.
    """
    import torch

    from ernieq.checkpoint import load_tokenizer
    from ernieq.generate import sample_documents, stack_experts
    from ernieq.load import load_model

    on_gpu = device.type == "cuda"
    model = load_model(directory, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:
        stack_experts(model)
    tokenizer = load_tokenizer(directory)
    progress.update("writing text", 0, tokens)
    written = 0
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for ids in sample_documents(
                model, tokens, seed=seed, temperature=temperature, on_tokens=progress.advance
            ):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += 1
        unfinished.replace(out)
    except OSError as error:
        raise StorageError(f"can't write {out}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return written


def own_text(
    directory: Path,
    out: Path,
    recipe: Recipe,
    device: torch.device,
    progress: ProgressReport,
    *,
    wanted: bool | None,
) -> tuple[Path, ...]:
    """Text of the model's own beside the output of a conversion; one that is there is used again.

    Args:
        directory: of the model.
        out: the output of the conversion.
        recipe: says how many tokens are needed, and the seed.
        device: where the model is to write.
        progress: where the user is told.
        wanted: whether the user wants it; None to have it only on a GPU that holds the model.

    Returns:
        The file, or nothing.

    Raises:
        BackendUnavailableError: the GPU has too little memory, and the user asked for it.
    """
    if wanted is False or (wanted is None and device.type == "cpu"):
        return ()
    path = out.with_name(f"{out.name}-text.jsonl")
    if path.exists():
        progress.line(f"calibrating on {path}, which an earlier command let the model write")
        return (path,)
    tokens = recipe.calibration.windows * recipe.calibration.window
    try:
        write_own_text(directory, path, tokens, device, recipe.seed, progress)
    except BackendUnavailableError as error:
        if wanted:
            raise
        progress.line(f"calibrating on the bundled texts, for the model can't write its own: {error}")
        return ()
    progress.line(f"calibrating on {path}, written by the model itself")
    return (path,)
