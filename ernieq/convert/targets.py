"""What a user asks for in place of ``--bits``: a size, or a divergence."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from ernieq.errors import UsageError
from ernieq.records import format_bytes

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class Goal(StrEnum):
    """What is bounded."""

    FILE = "target-size"
    DECODER = "target-decoder-size"
    BITS_PER_PARAMETER = "target-bpw"
    DIVERGENCE = "max-kl"


@dataclass(frozen=True)
class Target:
    """A bound: bytes, bits per parameter or nats, as ``goal`` says."""

    goal: Goal
    amount: float

    @property
    def option(self) -> str:
        """The option of the command line."""
        return f"--{self.goal}"

    @property
    def label(self) -> str:
        """Short, for a directory name: ``6GB``, ``13.7MB-decoder``, ``2.25bpw``, ``kl0.1``."""
        match self.goal:
            case Goal.FILE:
                return format_bytes(int(self.amount)).replace(" ", "")
            case Goal.DECODER:
                return format_bytes(int(self.amount)).replace(" ", "") + "-decoder"
            case Goal.BITS_PER_PARAMETER:
                return f"{self.amount:g}bpw"
            case Goal.DIVERGENCE:
                return f"kl{self.amount:g}"

    def limit_bytes(self, parameters: int) -> int:
        """The bound in bytes, for a model of so many parameters; a divergence bounds none."""
        assert self.goal is not Goal.DIVERGENCE
        if self.goal is Goal.BITS_PER_PARAMETER:
            return int(self.amount * parameters / 8)
        return int(self.amount)

    def smallest(self, size: int, parameters: int) -> str:
        """The smallest that can be reached, in the unit of the goal, rounded up so that asking for it works."""
        if self.goal is Goal.BITS_PER_PARAMETER:
            return f"{math.ceil(8000 * size / parameters) / 1000:.3f}"
        unit, factor = ("kB", 10**3) if size < 10**7 else ("MB", 10**6) if size < 10**10 else ("GB", 10**9)
        return f"{math.ceil(100 * size / factor) / 100:.2f}{unit}"


def parse_bytes(text: str, option: str) -> float:
    """A size such as ``6GB``, ``13.7 MB`` or ``5800000``; units are decimal, as on data sheets.

    Raises:
        UsageError: it is none, or not above zero.
    """
    match = _SIZE.fullmatch(text)
    unit = match.group(2).lower() or "b" if match else ""
    if match is None or unit not in _UNITS or not 0 < float(match.group(1)) < math.inf:
        hint = "; units are decimal (1 GB = 10^9 bytes), so GiB is not one" if unit.endswith("ib") else ""
        raise UsageError(
            f"{option} is {text!r}; it must be a size above zero such as 6GB, 13.7MB or 5800000{hint}"
        )
    return float(match.group(1)) * _UNITS[unit]
