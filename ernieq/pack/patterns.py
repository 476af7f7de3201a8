"""Many names in one line: ``model.layers.1-27.mlp.experts.0-63.gate_proj``.

A dotted component made of digits, ``-`` and ``,`` is a set of integers; the pattern stands for every name that
picks one integer from each set. 5,184 experts' matrices become three lines of ``config.json``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from ernieq.errors import FormatError

# Twelve times the matrices of the 300 B model; a reader counts before it expands.
MAX_NAMES = 1 << 17
# Of a pattern: its names times its own length. As many names as are allowed may have 128 characters each.
MAX_CHARACTERS = 1 << 24

_INTEGER = re.compile(r"0|[1-9][0-9]{0,5}")
_INTEGER_SET = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")

_Shape = tuple[str, ...]
_Indices = tuple[int, ...]


def is_pattern_free(name: str) -> bool:
    """Whether a name stands for itself: no component of it could be read as a set of integers."""
    return not any(_INTEGER_SET.fullmatch(part) and not _INTEGER.fullmatch(part) for part in name.split("."))


def expand_names(patterns: Iterable[str], what: str) -> list[str]:
    """All names that the patterns stand for, in the order of the patterns.

    Raises:
        FormatError: a set is malformed or falls, or the patterns stand for more than ``MAX_NAMES`` names, for
            names that are too long together, or for one name twice.
    """
    names: list[str] = []
    for pattern in patterns:
        names.extend(_expand(pattern, MAX_NAMES - len(names), what))
    if len(set(names)) != len(names):
        twice = next(name for name, again in itertools.pairwise(sorted(names)) if name == again)
        raise FormatError(f"{what} lists {twice} twice")
    return names


def compact_names(names: Iterable[str]) -> list[str]:
    """The fewest patterns that a greedy grouping finds; sorted.

    ``expand_names`` of the result gives the same names (in another order).

    Raises:
        FormatError: a name has a component that would be read as a set of integers.
    """
    groups: dict[_Shape, list[_Indices]] = {}
    for name in names:
        if not is_pattern_free(name):
            raise FormatError(
                f"{name} can't be listed in a manifest: a part of it reads like a range of numbers"
            )
        parts = name.split(".")
        numeric = [_INTEGER.fullmatch(part) is not None for part in parts]
        shape = tuple("" if number else part for part, number in zip(parts, numeric, strict=True))
        indices = tuple(int(part) for part, number in zip(parts, numeric, strict=True) if number)
        groups.setdefault(shape, []).append(indices)
    patterns = []
    for shape, tuples in groups.items():
        for sets in _boxes(sorted(set(tuples))):
            texts = iter(sets)
            patterns.append(".".join(part or next(texts) for part in shape))
    return sorted(patterns)


def _expand(pattern: str, limit: int, what: str) -> Iterator[str]:
    choices: list[Sequence[object]] = []
    for part in pattern.split("."):
        choices.append(_integers(part, what) if _INTEGER_SET.fullmatch(part) else (part,))
    count = math.prod(len(choice) for choice in choices)
    if count > limit:
        raise FormatError(f"{what} lists more than {MAX_NAMES} names (at {pattern[:80]!a})")
    if count * len(pattern) > MAX_CHARACTERS:
        raise FormatError(f"{what} lists {count} names of some {len(pattern)} characters (at {pattern[:80]!a})")
    return (".".join(map(str, chosen)) for chosen in itertools.product(*choices))


def _integers(part: str, what: str) -> Sequence[int]:
    integers: list[int] = []
    for piece in part.split(","):
        low, _, high = piece.partition("-")
        ends = (low, high or low)
        if not all(_INTEGER.fullmatch(end) for end in ends) or int(ends[0]) > int(ends[1]):
            raise FormatError(f"{what} holds {piece[:40]!a}, which is no range of integers below a million")
        if len(integers) + int(ends[1]) - int(ends[0]) >= MAX_NAMES:
            raise FormatError(f"{what} lists more than {MAX_NAMES} names (at {piece[:40]!a})")
        integers.extend(range(int(ends[0]), int(ends[1]) + 1))
    return integers


def _boxes(tuples: Sequence[_Indices]) -> list[list[str]]:
    """Cut sorted tuples into products of sets; tuples that share a set of tails are merged."""
    if not tuples[0]:
        return [[]]
    heads_of_tails: dict[tuple[_Indices, ...], list[int]] = {}
    for head, group in itertools.groupby(tuples, key=lambda indices: indices[0]):
        tails = tuple(indices[1:] for indices in group)
        heads_of_tails.setdefault(tails, []).append(head)
    return [[_integer_set(heads), *rest] for tails, heads in heads_of_tails.items() for rest in _boxes(tails)]


def _integer_set(integers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for integer in integers:
        if runs and integer == runs[-1][1] + 1:
            runs[-1][1] = integer
        else:
            runs.append([integer, integer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
