"""``ernieq generate``: complete a prompt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ernieq.cli.processor import settle_device
from ernieq.cli.shared import backend_option, device_option, model_directory, seed_option, threads_option
from ernieq.kernels.backend import Backend
from ernieq.records import format_rate

if TYPE_CHECKING:
    import torch


@click.command("generate")
@click.argument("path")
@click.argument("prompt")
@click.option(
    "--temperature",
    type=float,
    default=0.8,
    show_default=True,
    help="What logits are divided by; 0 takes the most likely token always.",
)
@click.option(
    "--top-p",
    type=float,
    default=0.95,
    show_default=True,
    help="Draw from the fewest tokens whose probabilities reach this sum.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Most tokens to add.")
@seed_option
@threads_option
@backend_option
@device_option
def command(
    path: str,
    prompt: str,
    temperature: float,
    top_p: float,
    stop: tuple[str, ...],
    max_tokens: int,
    seed: int,
    threads: int,
    backend: Backend,
    device: torch.device,
) -> None:
    """Complete PROMPT with the model in PATH, a packed or an ordinary checkpoint.

    The completion goes to stdout as it comes, the speed to stderr.

    \b
    Example:
      ernieq generate ernieq-nano-2bit "The old house stood" --max-tokens 60
    """
    import torch

    from ernieq.checkpoint import load_tokenizer
    from ernieq.generate import GenerateOptions, generate_text
    from ernieq.load import load_model

    options = GenerateOptions(max_tokens, temperature, top_p, seed, stop)
    torch.set_num_threads(threads)
    directory = model_directory(path)
    device = settle_device(device, backend)
    model = load_model(directory, device=device, backend=backend, threads=threads)
    tokenizer = load_tokenizer(directory)
    times = [time.perf_counter()]
    pieces = generate_text(
        model, tokenizer, prompt, options, on_token=lambda _token: times.append(time.perf_counter())
    )
    try:
        for piece in pieces:
            click.echo(piece, nl=False)
    finally:
        click.echo()
    click.echo(_speed(times), err=True)


generate = command


def _speed(times: list[float]) -> str:
    """A line on tokens and time; ``times`` are those of the start and of every token."""
    tokens = len(times) - 1
    if tokens < 2:
        return f"{tokens} tokens"
    rate = (tokens - 1) / (times[-1] - times[1])
    return f"{tokens} tokens; the first after {times[1] - times[0]:.2f} s, then {format_rate(rate, 'tokens')}"
