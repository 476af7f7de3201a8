"""SIGINT and SIGTERM of a long command: the unit of work under way is finished and saved, then it ends."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click

from ernieq.cli.group import ARGUMENTS
from ernieq.errors import InterruptedConversionError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_gently() -> Iterator[Callable[[], bool]]:
    """Note the first signal in place of dying from it; a second one ends the command at once.

    Yields:
        Says whether there was a signal.

    Raises:
        InterruptedConversionError: what stopped for it raised it; the sentence now tells how to go on.
    """
    signals: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        click.echo(
            "stopping as soon as the unit of work under way is saved; once more to stop at once", err=True
        )

    caught = _SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield lambda: bool(signals)
    except InterruptedConversionError as stop:
        raise InterruptedConversionError(f"{stop}; go on with: {command_line()}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_line() -> str:
    """The command as it was given, without what would throw finished work away."""
    given = click.get_current_context().find_root().meta.get(ARGUMENTS, [])
    return shlex.join(["ernieq", *(word for word in given if word != "--restart")])
