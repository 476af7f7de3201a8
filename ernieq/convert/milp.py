"""Choose one option per unit: least cost under a budget, exactly.

A multiple-choice knapsack, solved as a mixed-integer linear program by HiGHS (scipy.optimize.milp). Greedy
exchange by marginal gain, the usual way, misses the optimum where a unit is large beside what is left.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

_TIME_LIMIT = 60.0  # seconds; tens of units with ten options take well below one
_RELATIVE_GAP = 1e-5
_SCALE = 1000.0  # the solver's tolerances are absolute: both sums are brought to this size
_ROUNDS = 20


@dataclass(frozen=True)
class Option:
    """One way to treat a unit: what is to be least, and what the budget bounds."""

    cost: float
    weight: float


def choose(units: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The option of every unit with the least sum of costs, the sum of weights within the budget.

    Args:
        units: the options of every unit; at least one each, costs and weights not negative.
        budget: never exceeded, not even by a tolerance of the solver.

    Returns:
        The place of the chosen option in every unit; None if even the lightest options exceed the budget.
    """
    lightest = [min(range(len(options)), key=lambda place: options[place].weight) for options in units]
    if _total(units, lightest) > budget:
        return None
    bound = budget
    for _ in range(_ROUNDS):
        chosen = _solve(units, bound)
        if chosen is None:
            break
        excess = _total(units, chosen) - budget
        if excess <= 0:
            return chosen
        bound -= 2 * excess  # within the solver's tolerance only: ask for a little less
    return lightest


def _total(units: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[place].weight for options, place in zip(units, chosen, strict=True))


def _solve(units: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """One run of the solver: a binary variable per unit and option."""
    # A quarter of a second, which a conversion that chooses nothing need not wait for.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owner = np.repeat(np.arange(len(units)), [len(options) for options in units])
    costs = np.array([option.cost for options in units for option in options])
    weights = np.array([option.weight for options in units for option in options])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    largest = sum(max(option.cost for option in options) for options in units)
    with _silent_stdout():
        found = milp(
            costs * (_SCALE / largest if largest > 0 else 1.0),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(weights[None, :] * (_SCALE / max(budget, 1e-300)), -np.inf, _SCALE),
            ],
            bounds=Bounds(0, 1),
            integrality=np.ones(len(owner)),
            options={"time_limit": _TIME_LIMIT, "mip_rel_gap": _RELATIVE_GAP},
        )
    if found.x is None:
        return None
    chosen, start = [], 0
    for options in units:
        chosen.append(int(np.argmax(found.x[start : start + len(options)])))
        start += len(options)
    return chosen


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Send what compiled code writes to standard output nowhere: some versions of HiGHS print while they solve.

    Works below Python, on file descriptor 1, whatever ``sys.stdout`` is; nothing is done where it is closed.
    """
    _flush_stdout()
    try:
        kept = os.dup(1)
    except OSError:
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        _flush_stdout()  # what C still holds must go the same way
        os.dup2(kept, 1)
        os.close(kept)


def _flush_stdout() -> None:
    """Flush Python's standard output and those of C."""
    with suppress(AttributeError, OSError, ValueError):  # None, broken, closed
        sys.stdout.flush()
    with suppress(AttributeError, OSError, TypeError):  # where the C library is not found under no name
        ctypes.CDLL(None).fflush(None)
