"""Options of ``ernieq quantize`` that ask for a size or a divergence in place of ``--bits``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from ernieq.convert import Allocation, Goal, Target, parse_bytes
from ernieq.errors import UsageError
from ernieq.records import format_bits, format_significant

Function = TypeVar("Function", bound=Callable[..., Any])

_SIZES = {
    "target_size": (Goal.FILE, "Target: at most this much in all weight files, such as 6GB."),
    "target_decoder_size": (Goal.DECODER, "Target: so much without embedding and head, such as 13.7MB."),
}
_NUMBERS = {
    "target_bpw": (Goal.BITS_PER_PARAMETER, "Target: so many bits per parameter, all counted, such as 2.25."),
    "max_kl": (Goal.DIVERGENCE, "Target: the smallest file within this KL from the source, such as 0.1."),
}


def target_options(function: Function) -> Function:
    """Add ``--target-size``, ``--target-decoder-size``, ``--target-bpw`` and ``--max-kl``."""
    for name, (_, words) in reversed({**_SIZES, **_NUMBERS}.items()):
        kind: Any = str if name in _SIZES else click.FloatRange(min=0, min_open=True)
        metavar = "SIZE" if name in _SIZES else "NUMBER"
        function = click.option(f"--{name.replace('_', '-')}", name, type=kind, metavar=metavar, help=words)(
            function
        )
    return function


def chosen_target(settings: Mapping[str, Any], bits: float | None, hessians: object) -> Target | None:
    """The target that was asked for; None if there is none.

    Raises:
        UsageError: there are several, one is beside ``--bits`` or ``--hessians``, or a size is none.
    """
    given = [name for name in (*_SIZES, *_NUMBERS) if settings[name] is not None]
    if not given:
        return None
    options = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) > 1:
        raise UsageError(f"{options[0]} and {options[1]} can't both be met: give one of them")
    if bits is not None:
        raise UsageError(f"{options[0]} chooses the bits itself: leave out --bits (options of parts stay)")
    if hessians is not None:
        raise UsageError(
            f"{options[0]} measures the model on texts, which --hessians replaces: give one of the two"
        )
    name, value = given[0], settings[given[0]]
    if name in _SIZES:
        return Target(_SIZES[name][0], parse_bytes(value, options[0]))
    if not math.isfinite(value):
        raise UsageError(f"{options[0]} is {value}; it must be a finite number above zero")
    return Target(_NUMBERS[name][0], value)


def print_allocation(allocation: Allocation) -> None:
    """A table of the units: rate and sensitivity."""
    table = Table(title="Rates by measured sensitivity")
    table.add_column("unit")
    for heading in ("bits", "KL per squared error"):
        table.add_column(heading, justify="right")
    for name, bits in allocation.rates.items():
        table.add_row(name, format_bits(bits), format_significant(allocation.sensitivities[name]))
    console = Console()
    console.print(table, markup=False)
    console.print(
        f"predicted KL {format_significant(allocation.predicted_kl)} nats per token, errors uncorrected"
    )
