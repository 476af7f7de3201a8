"""``--quiet`` and ``--verbose`` of every command, and the one place where a command speaks beside its result.

What goes to stderr is one of four things:

    progress   a bar, and a line for each finished part    on a terminal, or with --verbose
    detail     what went into a step, for the curious      with --verbose
    note       what the user may want to know              unless --quiet
    warning    what changes the result                     always

A result goes to stdout, an error to stderr, whatever was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import click

_KEY = "ernieq.verbosity"


class Verbosity(IntEnum):
    """How much a command tells beside its result."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


def verbosity() -> Verbosity:
    """What was asked of the running command; ``NORMAL`` outside of one."""
    context = click.get_current_context(silent=True)
    return Verbosity.NORMAL if context is None else context.meta.get(_KEY, Verbosity.NORMAL)


def note(text: str) -> None:
    """Print a line on stderr, unless ``--quiet``."""
    if verbosity() >= Verbosity.NORMAL:
        click.echo(text, err=True)


def detail(text: str) -> None:
    """Print a line on stderr if ``--verbose``."""
    if verbosity() >= Verbosity.VERBOSE:
        click.echo(text, err=True)


def verbosity_options() -> list[click.Option]:
    """Options that a command or a group can be given; no function receives their values."""
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_asked_for(Verbosity.QUIET),
            help="Print the result, warnings and errors only.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_asked_for(Verbosity.VERBOSE),
            help="Print what every step does, into a pipe too.",
        ),
    ]


def _asked_for(asked: Verbosity) -> Callable[[click.Context, click.Parameter, bool], None]:
    """A click callback that notes a verbosity if its flag was given."""

    def note_it(context: click.Context, _parameter: click.Parameter, given: bool) -> None:
        if not given:
            return
        if context.meta.get(_KEY, asked) is not asked:
            raise click.UsageError("--quiet and --verbose can't both be met: give one of them", context)
        context.meta[_KEY] = asked

    return note_it
