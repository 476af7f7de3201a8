"""``ernieq bench``: how fast a model reads and writes, and how near that is to the memory's limit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ernieq.cli.processor import settle_device
from ernieq.cli.shared import (
    backend_option,
    device_option,
    directories,
    json_option,
    model_directory,
    print_json,
    progress_report,
    seed_option,
    threads_option,
)
from ernieq.errors import UsageError
from ernieq.kernels.backend import Backend
from ernieq.records import format_bytes, format_rate

if TYPE_CHECKING:
    import torch

    from ernieq.load.source import WeightSource
    from ernieq.model import ErnieForCausalLM, ModelConfig
    from ernieq.runtime.speed import Speed


_DEFAULT_PROMPTS = (128, 4096)


@dataclass(frozen=True)
class _Plan:
    """What is to be measured."""

    prompts: tuple[int, ...]
    steps: int
    batch: int
    context: int | None
    seed: int

    @property
    def max_tokens(self) -> int:
        """Tokens that a sequence must have room for: those asked for, or what is needed."""
        needed = max(self.prompts) + self.steps
        if self.context is not None and self.context < needed:
            raise UsageError(
                f"--context is {self.context}; a prompt of {max(self.prompts)} and {self.steps} tokens need "
                f"{needed}"
            )
        return self.context or needed


def _lengths(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        lengths = tuple(int(part) for part in value.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise click.BadParameter(f"{value!r} is no list of positive numbers, as 128,4096 is one")
    return lengths


@click.command("bench")
@click.argument("path", shell_complete=directories)
@click.option(
    "--prompt",
    "prompts",
    default=None,
    metavar="N,...",
    callback=_lengths,
    help="Lengths of the prompts, in tokens.  [default: 128,4096, or what the model has positions for]",
)
@click.option(
    "--tokens", "steps", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to write."
)
@click.option("--batch", type=click.IntRange(1, 8), default=1, show_default=True, help="Sequences at a time.")
@click.option(
    "--context", type=click.IntRange(min=1), help="Tokens to keep room for.  [default: what is needed]"
)
@device_option
@seed_option
@threads_option
@backend_option
@json_option
def command(
    path: str,
    prompts: tuple[int, ...] | None,
    device: torch.device,
    threads: int,
    backend: Backend,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the speed of PATH, a packed or an ordinary checkpoint.

    For each length of prompt: tokens per second for the prompt (prefill) and for what follows it (decode), and
    the bytes that a written token has to read, as a share of what this machine copies at best in that time.
    Prompts are random tokens.

    \b
    Example:
      ernieq bench ernieq-nano-2bit --prompt 128,1024 --tokens 64
    """
    import torch

    plan = _Plan(prompts or _DEFAULT_PROMPTS, **options)
    if prompts is not None:
        plan.max_tokens  # noqa: B018 - what does not fit together is refused before the model is loaded
    torch.set_num_threads(threads)
    device = settle_device(device, backend, quiet=as_json)
    model, source = _load(path, device, backend, threads)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    positions = model.config.max_position_embeddings
    if prompts is None:
        fitting = tuple(length for length in plan.prompts if length + plan.steps <= positions)
        plan = dataclasses.replace(plan, prompts=fitting or (max(positions - plan.steps, 1),))
    max_tokens = plan.max_tokens
    if max_tokens > positions:
        raise UsageError(f"{max_tokens} tokens are asked for; {path} takes {positions}")
    result = _measure(model, source, plan, max_tokens, device)
    if as_json:
        print_json({"path": path, **result})
    else:
        _print_table(path, result)


bench = command


def _load(
    path: str, device: torch.device, backend: Backend, threads: int
) -> tuple[ErnieForCausalLM, WeightSource]:
    from ernieq.load import load_model
    from ernieq.load.source import open_source

    directory = model_directory(path)
    model = load_model(directory, device=device, backend=backend, threads=threads)
    return model, open_source(directory)


def _measure(
    model: ErnieForCausalLM, source: WeightSource, plan: _Plan, max_tokens: int, device: torch.device
) -> dict[str, Any]:
    import torch

    from ernieq.runtime import PackedRuntime
    from ernieq.runtime.speed import copy_bandwidth, measure_speed, new_engine

    weights = _weight_bytes(model, source)
    generator = torch.Generator().manual_seed(plan.seed)
    engine = new_engine(model, max_tokens=max_tokens, batch=plan.batch)
    rows = []
    with progress_report("bench", total=len(plan.prompts), unit="prompts") as report:
        for done, length in enumerate(plan.prompts):
            report.update(f"prompt of {length} tokens", done, len(plan.prompts))
            token_ids = torch.randint(0, model.config.vocab_size, (plan.batch, length), generator=generator)
            speed = measure_speed(engine, token_ids, plan.steps)
            rows.append(_row(speed, plan.batch, model.config, weights, engine.cache_bytes))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    bandwidth = copy_bandwidth(device)
    for row in rows:
        row["bandwidth_share"] = row["step_bytes"] / (row["step_milliseconds"] / 1e3) / bandwidth
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "engine": "forward" if PackedRuntime.supports(model) else "runtime",
        "batch": plan.batch,
        "context": max_tokens,
        "tokens": plan.steps,
        "rows": rows,
        "copy_bytes_per_second": bandwidth,
        "peak_gpu_bytes": peak,
    }


def _weight_bytes(model: ErnieForCausalLM, source: WeightSource) -> dict[str, int]:
    """What each weight takes in memory: stored bytes if it is packed, else those of the model's dtype."""
    from math import prod

    from ernieq.runtime.traffic import weight_bytes

    stored = source.tensor_bytes()
    width = next(model.parameters()).dtype.itemsize
    return weight_bytes(
        model.config,
        lambda name, spec: (
            stored[name] if source.is_quantized(name.removesuffix(".weight")) else width * prod(spec.shape)
        ),
    )


def _row(
    speed: Speed, batch: int, config: ModelConfig, weights: dict[str, int], cache_bytes: int
) -> dict[str, Any]:
    from ernieq.runtime.traffic import step_bytes

    return {
        "prompt": speed.prompt,
        "prefill_tokens_per_second": batch * speed.prompt / speed.prefill_seconds,
        "decode_tokens_per_second": batch / speed.step_seconds,
        "step_milliseconds": 1e3 * speed.step_seconds,
        "step_bytes": step_bytes(config, weights, batch=batch, context=speed.context, cache_bytes=cache_bytes),
    }


def _print_table(path: str, result: dict[str, Any]) -> None:
    how = "captured steps" if result["engine"] == "runtime" else "plain forward passes"
    click.echo(f"{path} on {result['device']}, {how}, batch {result['batch']}, {result['tokens']} tokens")
    click.echo(f"{'prompt':>8}  {'prefill':>16}  {'decode':>16}  {'step':>10}  {'read':>9}  {'of copying':>10}")
    for row in result["rows"]:
        click.echo(
            f"{row['prompt']:>8}  {format_rate(row['prefill_tokens_per_second'], 'tokens'):>16}  "
            f"{format_rate(row['decode_tokens_per_second'], 'tokens'):>16}  "
            f"{row['step_milliseconds']:>7.2f} ms  {format_bytes(row['step_bytes']):>9}  "
            f"{row['bandwidth_share']:>10.1%}"
        )
    click.echo(f"copying: {result['copy_bytes_per_second'] / 1e9:,.1f} GB/s read and written")
    if result["peak_gpu_bytes"] is not None:
        click.echo(f"peak GPU memory: {format_bytes(result['peak_gpu_bytes'])}")
