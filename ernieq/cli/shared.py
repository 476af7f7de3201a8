"""Options that several commands take, and how a command shows that it is still at work.

    @click.command(name="verify")
    @click.argument("path", type=CHECKPOINT)
    @threads_option
    @json_option
    def command(path: Path, threads: int, as_json: bool) -> None:

Results go to stdout, progress to stderr: a result can be piped while a bar is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ernieq.bundled import resolve_source
from ernieq.cli.verbosity import Verbosity, verbosity
from ernieq.kernels.backend import Backend, default_threads
from ernieq.records import format_bytes, format_rate

if TYPE_CHECKING:
    from ernieq.checkpoint import Checkpoint

Function = TypeVar("Function", bound=Callable[..., Any])
_AUTO_DEVICE = "ernieq.auto_device"


def directories(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell complete a directory; for ``shell_complete`` of an argument that may be a hub id too."""
    return [CompletionItem(incomplete, type="dir")]


def threads_option(function: Function) -> Function:
    """Add ``--threads``; the command receives ``threads: int``, at least 1."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=default_threads,
        show_default="all processors",
        help="Number of CPU threads.",
    )(function)


def backend_option(function: Function) -> Function:
    """Add ``--backend``; the command receives ``backend: Backend``."""
    return click.option(
        "--backend",
        type=click.Choice([backend.value for backend in Backend]),
        default=Backend.AUTO.value,
        show_default=True,
        callback=lambda _context, _parameter, name: Backend(name),
        help="Implementation of the kernels; auto takes the fastest that this processor can run.",
    )(function)


def device_option(function: Function) -> Function:
    """Add ``--device``; the command receives ``device: torch.device``."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda|cuda:N",
        callback=_resolve_device,
        help="Processor that does the work; auto takes the GPU if there is one that can.",
    )(function)


def _resolve_device(context: click.Context, _parameter: click.Parameter, name: str) -> Any:
    from ernieq.kernels.device import resolve_device  # brings torch in: not before it is needed

    context.meta[_AUTO_DEVICE] = name == "auto"
    return resolve_device(name)


def device_was_chosen() -> bool:
    """Whether ``--device auto`` of the running command chose its device: the user may want to be told."""
    return bool(click.get_current_context().meta.get(_AUTO_DEVICE))


def vram_option(function: Function) -> Function:
    """Add ``--vram``; the command receives ``vram: float | None``, gigabytes."""
    return click.option(
        "--vram",
        type=click.FloatRange(min=1),
        metavar="GB",
        help="GPU memory that may be used.  [default: 90 % of what is free]",
    )(function)


def json_option(function: Function) -> Function:
    """Add ``--json``; the command receives ``as_json: bool``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of a table.")(
        function
    )


def overwrite_option(function: Function) -> Function:
    """Add ``--overwrite``; the command receives ``overwrite: bool``."""
    return click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")(function)


def restart_option(function: Function) -> Function:
    """Add ``--restart``; the command receives ``restart: bool``."""
    words = "Begin anew in place of going on with what an interrupted run has left in OUT.partial."
    return click.option("--restart", is_flag=True, help=words)(function)


def seed_option(function: Function) -> Function:
    """Add ``--seed``; the command receives ``seed: int``, 0 unless said otherwise."""
    return click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**63 - 1),
        default=0,
        show_default=True,
        help="Seed of everything that is drawn at random.",
    )(function)


def text_option(function: Function) -> Function:
    """Add ``--text``; the command receives ``texts: tuple[Path, ...]``."""
    return click.option(
        "--text",
        "texts",
        multiple=True,
        type=click.Path(path_type=Path),
        help="A calibration text, .txt or .jsonl; may be given again.  [default: the bundled texts]",
    )(function)


def model_directory(path: str) -> Path:
    """The directory of PATH: itself, a bundled model's, or what was fetched of a hub id."""
    from ernieq.checkpoint import locate

    return locate(resolve_source(path))[0]


@contextmanager
def source_checkpoint(name: str, revision: str | None, *, headers_only: bool) -> Iterator[Checkpoint]:
    """The ordinary checkpoint that a path, ``bundled:NAME`` or hub id names.

    Args:
        name: what the user wrote.
        revision: branch, tag or commit on the hub.
        headers_only: of a hub id, fetch no weights: names, shapes and dtypes are all that will be looked at.
    """
    from ernieq.checkpoint import header_directory, open_checkpoint

    source = resolve_source(name)
    if not headers_only:
        yield open_checkpoint(source, revision=revision)
        return
    with header_directory(source, revision) as directory:
        yield open_checkpoint(directory)


def print_json(value: Any) -> None:
    """Print a result as one indented JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


class ProgressReport:
    """What a command tells while it works: a bar that moves on, and lines that stay.

    The bar is drawn only on a terminal. Away from one nothing tells of progress unless ``--verbose``; lines,
    which tell of what was found or chosen, are printed there too. See ``ernieq.cli.verbosity``.
    """

    def __init__(self, console: Console, bar: Progress | None, task: TaskID | None) -> None:
        self._console = console
        self._bar = bar
        self._task = task
        self._told = ""  # the last step that --verbose has printed

    def advance(self, amount: float = 1) -> None:
        """Move the bar on by an amount of work."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def update(self, what: str, done: float, total: float) -> None:
        """Say what is being done and how far it is; fits the libraries' ``on_progress``."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)
        self._tell(what)

    def describe(self, what: str) -> None:
        """Say what is being done, leaving the bar where it is."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)
        self._tell(what)

    def finished(self, text: str) -> None:
        """Print the figures of a finished part, such as a layer: on a terminal, or with ``--verbose``."""
        if self._console.is_terminal or verbosity() is Verbosity.VERBOSE:
            self.line(text)

    def detail(self, text: str) -> None:
        """Print a line if ``--verbose``."""
        if verbosity() is Verbosity.VERBOSE:
            self.line(text)

    @property
    def on_terminal(self) -> bool:
        """Whether somebody watches."""
        return self._bar is not None

    def table(self, table: Table) -> None:
        """Print a table that stays, unless ``--quiet``."""
        if verbosity() is not Verbosity.QUIET:
            self._console.print(table)

    def line(self, text: str) -> None:
        """Print a line that stays, unless ``--quiet``."""
        if verbosity() is not Verbosity.QUIET:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print a line that stays whatever was asked for: it tells of a result that differs."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def terminal_line(self, text: str) -> None:
        """Print a line that stays, but only where the bar is drawn too."""
        if self._bar is not None:
            self.line(text)

    def _tell(self, what: str) -> None:
        """With ``--verbose``, a line for every step that begins."""
        if what != self._told:
            self._told = what
            self.detail(what)


@contextmanager
def progress_report(
    description: str, *, total: float | None = None, unit: str = "steps", console: Console | None = None
) -> Iterator[ProgressReport]:
    """Show a bar with rate and time left on a terminal, unless ``--quiet``; elsewhere show only the lines.

    Args:
        description: what is being done, in a few words.
        total: amount of work, if it is known.
        unit: what the work is counted in, for the rate ("layers", "windows").
        console: where to draw; stderr unless given.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal or verbosity() is Verbosity.QUIET:
        yield ProgressReport(console, None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield ProgressReport(console, bar, bar.add_task(description, total=total))


class _RateColumn(ProgressColumn):
    """Work done per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """The rate, or nothing before there is one."""
        if not task.speed:
            return Text("")
        in_bytes = self._unit == "bytes"  # which have units of their own
        text = f"{format_bytes(round(task.speed))}/s" if in_bytes else format_rate(task.speed, self._unit)
        return Text(text, style="progress.data.speed")
