"""``ernieq generate``: complete prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
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
    seed_option,
    threads_option,
)
from ernieq.cli.verbosity import note
from ernieq.errors import TextError, UsageError
from ernieq.kernels.backend import Backend
from ernieq.records import format_rate

if TYPE_CHECKING:
    import torch

    from ernieq.generate import GenerateOptions
    from ernieq.model import ErnieForCausalLM

_STDIN = "-"


@click.command("generate")
@click.argument("path", shell_complete=directories)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
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
@json_option
def command(
    path: str,
    prompts: tuple[str, ...],
    temperature: float,
    top_p: float,
    stop: tuple[str, ...],
    max_tokens: int,
    seed: int,
    threads: int,
    backend: Backend,
    device: torch.device,
    as_json: bool,
) -> None:
    """Complete every PROMPT with the model in PATH, a packed or an ordinary checkpoint.

    With no PROMPT, or with - in its place, a prompt is read from stdin, to its end. Completions go to stdout as
    they come, under a line with their prompt if there are several; speeds go to stderr. The seed is the same
    for each, so that none depends on the others.

    \b
    Example:
      ernieq generate ernieq-nano-2bit "The old house stood" --max-tokens 60
      ernieq generate ernieq-nano-2bit "The old house stood" "The river" --json
      echo "The old house stood" | ernieq generate ernieq-nano-2bit
    """
    import torch

    from ernieq.checkpoint import load_tokenizer
    from ernieq.generate import GenerateOptions
    from ernieq.load import load_model

    options = GenerateOptions(max_tokens, temperature, top_p, seed, stop)
    texts = _prompts(prompts)
    torch.set_num_threads(threads)
    directory = model_directory(path)
    device = settle_device(device, backend, quiet=as_json)
    model = load_model(directory, device=device, backend=backend, threads=threads)
    tokenizer = load_tokenizer(directory)
    completions = [_Completion(model, tokenizer, text, options) for text in texts]
    if as_json:
        records = [completion.run().record() for completion in completions]
        print_json({"path": path, "device": str(device), "options": asdict(options), "completions": records})
        return
    for completion in completions:
        if len(texts) > 1:
            click.echo(f"==> {completion.prompt}")
        completion.stream()


generate = command


def _prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, with what stdin holds in place of ``-``; stdin alone if there are none.

    Raises:
        UsageError: there is no prompt, or stdin is asked for twice.
        TextError: stdin is not UTF-8.
    """
    if not prompts and sys.stdin.isatty():
        raise UsageError("there is no prompt: give one, or - to type it and end it with Ctrl-D")
    wanted = list(prompts) or [_STDIN]
    if wanted.count(_STDIN) > 1:
        raise UsageError("- stands for stdin, which can be read once")
    if _STDIN not in wanted:
        return wanted
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"stdin is not UTF-8: {error.reason} at byte {error.start}") from error
    text = text.removesuffix("\n").removesuffix("\r")  # the end of a line is the pipe's, not the prompt's
    return [text if prompt == _STDIN else prompt for prompt in wanted]


@dataclass
class _Completion:
    """One prompt, its completion as it comes, and the times of its tokens."""

    model: ErnieForCausalLM
    tokenizer: Any
    prompt: str
    options: GenerateOptions
    text: str = ""
    times: list[float] = field(default_factory=list)

    def run(self) -> _Completion:
        """Complete the prompt in silence."""
        for _ in self._pieces():
            pass
        return self

    def stream(self) -> None:
        """Print pieces as they come, then the speed."""
        try:
            for piece in self._pieces():
                click.echo(piece, nl=False)
        finally:
            click.echo()
        note(self._speed())

    def record(self) -> dict[str, Any]:
        """What ``--json`` says of it."""
        tokens = len(self.times) - 1
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": tokens,
            "seconds_to_first_token": self.times[1] - self.times[0] if tokens else None,
            "tokens_per_second": self._rate(),
        }

    def _pieces(self) -> Iterator[str]:
        from ernieq.generate import generate_text

        self.times = [time.perf_counter()]
        for piece in generate_text(
            self.model,
            self.tokenizer,
            self.prompt,
            self.options,
            on_token=lambda _token: self.times.append(time.perf_counter()),
        ):
            self.text += piece
            yield piece

    def _rate(self) -> float | None:
        """Tokens a second behind the first; None if there are none."""
        tokens = len(self.times) - 1
        return (tokens - 1) / (self.times[-1] - self.times[1]) if tokens > 1 else None

    def _speed(self) -> str:
        """A line on tokens and time."""
        tokens, rate = len(self.times) - 1, self._rate()
        if rate is None:
            return f"{tokens} tokens"
        first = self.times[1] - self.times[0]
        return f"{tokens} tokens; the first after {first:.2f} s, then {format_rate(rate, 'tokens')}"
