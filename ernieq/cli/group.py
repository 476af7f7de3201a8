"""The command group: commands loaded when called, and every failure turned into one sentence."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from ernieq.cli.verbosity import verbosity_options
from ernieq.errors import (
    BackendUnavailableError,
    ErnieqError,
    InterruptedConversionError,
    StorageError,
    memory_fault,
)

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, what a shell reports for Ctrl-C
ARGUMENTS = "ernieq.arguments"  # under which the context keeps the words of the command line
INTERNAL_ERROR_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h

_MEMORY_REMEDY = "end other programs, or raise the limit of the container, and run the same command again"

_STORAGE_ERRNOS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "access is not permitted",
    errno.EPERM: "access is not permitted",
    errno.EIO: "the disk reports a read or write error",
}


@dataclass(frozen=True)
class CommandEntry:
    """A line of the group's help; ``name`` also says which file holds the command."""

    name: str
    summary: str

    @property
    def module(self) -> str:
        """Dotted name of the file that defines the command."""
        return f"ernieq.cli.{self.name.replace('-', '_')}"


@dataclass(frozen=True)
class CommandSection:
    """Commands that stand under one heading in the group's help."""

    title: str
    entries: tuple[CommandEntry, ...]


class ErnieqGroup(click.Group):
    """A click group that imports a command only to run it or to print its help.

    It and all of its commands take ``--quiet`` and ``--verbose``.
    """

    def __init__(self, *args: Any, sections: tuple[CommandSection, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections
        self.params += verbosity_options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words of the command line: one that is interrupted says how to go on."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """All command names, in the order of the help."""
        return [entry.name for section in self.sections for entry in section.entries]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command's file; ``None`` for a name that is not listed."""
        for section in self.sections:
            for entry in section.entries:
                if entry.name == cmd_name:
                    return _with_verbosity(importlib.import_module(entry.module).command)
        return None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command from the table; click would import every command to ask it."""
        entries = (entry for section in self.sections for entry in section.entries)
        names = [
            CompletionItem(entry.name, help=entry.summary)
            for entry in entries
            if entry.name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Print the sections from their table, importing nothing."""
        for section in self.sections:
            with formatter.section(section.title):
                formatter.write_dl([(entry.name, entry.summary) for entry in section.entries])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever goes wrong leaves as a sentence and an exit code."""
        with failures_as_sentences(ctx, debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


def _with_verbosity(command: click.Command) -> click.Command:
    """The command, with ``--quiet`` and ``--verbose`` if it was not given them before."""
    if not any(parameter.name == "quiet" for parameter in command.params):
        command.params += verbosity_options()
    return command


@contextmanager
def failures_as_sentences(ctx: click.Context, *, debug: bool) -> Iterator[None]:
    """Turn what a command raises into one sentence on stderr and an exit code.

    With ``debug`` the exception is raised on, so that its traceback is seen. Click's own exceptions (a bad
    option, ``ctx.exit``) and a closed pipe are left to click.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        message, exit_code = _sentence(error)
        click.echo(message, err=True)
        ctx.exit(exit_code)


def _sentence(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code that goes with it."""
    match error:
        case InterruptedConversionError():
            return f"Interrupted: {error}", error.exit_code
        case ErnieqError():
            return f"Error: {error}", error.exit_code
        case KeyboardInterrupt():
            return "Interrupted: stopped before the command had finished", INTERRUPTED_EXIT_CODE
        case _ if fault := memory_fault(error):
            return f"Error: {fault}; {_MEMORY_REMEDY}", BackendUnavailableError.exit_code
        case OSError(errno=int(number)) if number in _STORAGE_ERRNOS:
            place = f"{error.filename}: " if error.filename else ""
            return f"Error: {place}{_STORAGE_ERRNOS[number]}", StorageError.exit_code
        case _:
            return (
                f"Error: internal error, {type(error).__name__}: {_first_line(error)}; "
                "run ernieq --debug COMMAND to see where it happened",
                INTERNAL_ERROR_EXIT_CODE,
            )


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, which may be empty or long."""
    return (str(error).splitlines() or ["no message"])[0]
