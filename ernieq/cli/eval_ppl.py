"""``ernieq eval-ppl``: perplexity of a model, and its divergence from the base."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ernieq.bundled import resolve_source
from ernieq.cli.processor import settle_device
from ernieq.cli.shared import (
    ProgressReport,
    backend_option,
    device_option,
    directories,
    json_option,
    print_json,
    progress_report,
    seed_option,
    threads_option,
)
from ernieq.errors import UsageError
from ernieq.kernels.backend import Backend
from ernieq.pack import PackedReader, is_packed
from ernieq.records import EvaluationRecord, WeightsRecord, to_plain

if TYPE_CHECKING:
    import torch

    from ernieq.load import ModelStream

_DEFAULT_WINDOW = 2048
_PIPE_WIDTH = 160  # a pipe or a file has no width that lines would have to fit into


@dataclass(frozen=True)
class _Plan:
    """What is to be measured: the options that concern texts, windows and memory."""

    texts: tuple[str, ...]
    protocol: str
    window: int | None
    max_windows: int | None
    max_bytes: int | None
    batch: int
    seed: int
    noise_floor: bool


@click.command("eval-ppl")
@click.argument("path", shell_complete=directories)
@click.option("--base", metavar="PATH|none", help="Model to compare with [default: the one in the manifest].")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE|NAME",
    help="A .txt or .jsonl file, or a bundled text; may be repeated [default: all bundled texts].",
)
@click.option(
    "--protocol",
    type=click.Choice(["gptq", "llama.cpp"]),
    default="gptq",
    show_default=True,
    help="gptq scores all of a window; llama.cpp its second half, after a begin-of-text token.",
)
@click.option(
    "--window",
    type=click.IntRange(min=4),
    help=f"Tokens per window [default: {_DEFAULT_WINDOW}, or the model's positions if fewer].",
)
@click.option(
    "--max-windows", type=click.IntRange(min=1), help="Measure only the first N windows of each text."
)
@click.option("--max-bytes", type=click.IntRange(min=1), help="Read only the first N bytes of each text.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Windows per step.")
@click.option(
    "--noise-floor",
    is_flag=True,
    help="Measure the base in bfloat16 arithmetic too: a divergence that is no larger is noise.",
)
@seed_option
@threads_option
@backend_option
@device_option
@json_option
def command(
    path: str,
    base: str | None,
    threads: int,
    backend: Backend,
    device: torch.device,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the perplexity of PATH, a packed or an ordinary checkpoint.

    With a base model: also the divergence from it, the ratio of perplexities, and how often both agree. One
    decoder layer is in memory at a time, so a model larger than memory can be measured.

    \b
    Example:
      ernieq eval-ppl ernieq-nano-2bit --text wikitext2 --window 1024
    """
    import torch

    from ernieq.load import open_stream

    start = time.perf_counter()
    plan = _Plan(**options)
    torch.set_num_threads(threads)
    device = settle_device(device, backend, quiet=as_json)
    torch.set_float32_matmul_precision("highest")  # no TF32: figures of a GPU and of the CPU are to agree
    stream = open_stream(resolve_source(path), device=device, backend=backend, threads=threads)
    base_source = _base_source(stream, base)
    base_stream = None
    if base_source is not None:
        base_stream = open_stream(base_source, device=device, backend=backend, threads=threads)
    noise_stream = None
    if plan.noise_floor:
        if base_source is None:
            raise UsageError("--noise-floor is the base's own divergence, and there is no base; pass --base")
        noise_stream = open_stream(
            base_source, device=device, backend=backend, threads=threads, dtype=torch.bfloat16
        )
    records = _measure(stream, base_stream, noise_stream, plan)
    weights = _weights(stream.weight_bytes())
    base_weights = None if base_stream is None else _weights(base_stream.weight_bytes())
    seconds = time.perf_counter() - start
    if as_json:
        settings = {"path": path, "base": None if base_source is None else str(base_source), "threads": threads}
        print_json(_result(settings, plan, records, weights, base_weights, seconds))
    else:
        _print_table(path, base_source, records, weights, base_weights, seconds)


eval_ppl = command


def _base_source(stream: ModelStream, option: str | None) -> str | Path | None:
    """The base to compare with: the option's, else the manifest's if it is on this machine."""
    from ernieq.evaluate import resolve_base

    if option is not None:
        return None if option == "none" else resolve_source(option)
    if stream.base is None:
        return None
    found = resolve_base(stream.base)
    if found is None:
        click.echo(
            f"The base {stream.base} is not on this machine: measuring without it; --base PATH names another.",
            err=True,
        )
    return found


def _measure(
    stream: ModelStream, base_stream: ModelStream | None, noise_stream: ModelStream | None, plan: _Plan
) -> list[EvaluationRecord]:
    from ernieq.checkpoint import load_tokenizer
    from ernieq.evaluate import Budget, Protocol, evaluate_text, load_text, text_names

    window = plan.window or min(_DEFAULT_WINDOW, stream.config.max_position_embeddings)
    # All texts are read before anything is measured: a misspelt name should not be found an hour later.
    texts = [load_text(name, max_bytes=plan.max_bytes) for name in plan.texts or text_names()]
    tokenizer = load_tokenizer(stream.tokenizer_directory)
    records = []
    for text in texts:
        with progress_report(text.name) as report:
            record = evaluate_text(
                stream,
                text,
                tokenizer,
                protocol=Protocol(plan.protocol),
                window=window,
                max_windows=plan.max_windows,
                base_stream=base_stream,
                noise_stream=noise_stream,
                budget=Budget.on(stream.device, batch=plan.batch),
                seed=plan.seed,
                on_progress=_forward(report, text.name),
            )
        records.append(record)
    return records


def _forward(report: ProgressReport, name: str) -> Callable[[str, int, int], None]:
    def show(what: str, done: int, total: int) -> None:
        report.update(f"{name}: {what}", done, total)

    return show


def _weights(sizes: Mapping[str, Any]) -> WeightsRecord:
    return WeightsRecord(
        file_bytes=sizes["total"],
        decoder_bytes=sizes["decoder"],
        parameters=sizes["parameters"],
        quantized_bytes=sizes["quantized"],
        quantized_parameters=sizes["quantized_parameters"],
    )


def _result(
    settings: dict[str, Any],
    plan: _Plan,
    records: list[EvaluationRecord],
    weights: WeightsRecord,
    base_weights: WeightsRecord | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        **settings,
        "protocol": plan.protocol,
        "max_windows": plan.max_windows,
        "max_bytes": plan.max_bytes,
        "batch": plan.batch,
        "seed": plan.seed,
        "texts": [to_plain(record) for record in records],
        "weights": _plain_weights(weights),
        "base_weights": None if base_weights is None else _plain_weights(base_weights),
        "seconds": seconds,
        "versions": _versions(),
    }


def _plain_weights(weights: WeightsRecord) -> dict[str, Any]:
    bits = weights.quantized_bits if weights.quantized_parameters else None
    return {**to_plain(weights), "bits_per_weight": weights.bits, "quantized_bits_per_weight": bits}


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import ernieq

    return {
        "ernieq": ernieq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _conversion_seconds(path: str) -> float | None:
    """How long the conversion took, if the manifest of a packed checkpoint says so."""
    directory = Path(resolve_source(path))
    if not is_packed(directory):
        return None
    seconds = PackedReader(directory).manifest.report.get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else None


def _print_table(
    path: str,
    base_source: str | Path | None,
    records: list[EvaluationRecord],
    weights: WeightsRecord,
    base_weights: WeightsRecord | None,
    seconds: float,
) -> None:
    from rich.console import Console

    from ernieq.report import comparison_table

    times = {"conversion": conversion} if (conversion := _conversion_seconds(path)) is not None else {}

    table = comparison_table(
        records,
        weights,
        name=Path(path).name,
        base_name=None if base_source is None else Path(base_source).name,
        base_weights=base_weights,
        times={**times, "evaluation": seconds},
    )
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table.rich())
