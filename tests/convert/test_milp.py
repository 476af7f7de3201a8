"""The choice of rates is the best there is, and never beyond the budget."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import subprocess
import sys
from typing import Any

import pytest
from scipy.optimize import milp

from ernieq.convert.milp import Option, choose


def problem(seed: int, units: int = 5, rates: int = 4) -> list[list[Option]]:
    """Units of very different sizes, as in a model: sizes rise with the rate, costs fall fourfold a bit."""
    draw = random.Random(seed)
    found = []
    for _ in range(units):
        weights, cost = 10 ** draw.uniform(2, 5), 10 ** draw.uniform(-4, 1)
        found.append([Option(cost * 4.0**-rate, float(int(weights * (2 + rate) / 8))) for rate in range(rates)])
    return found


def totals(units: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[float, float]:
    options = [unit[place] for unit, place in zip(units, chosen, strict=True)]
    return sum(option.cost for option in options), sum(option.weight for option in options)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_costs_no_more_than_the_best_of_all_choices(seed: int) -> None:
    units = problem(seed)
    everything = [totals(units, chosen) for chosen in itertools.product(*(range(len(unit)) for unit in units))]
    lightest, heaviest = min(w for _, w in everything), max(w for _, w in everything)
    for share in (0.0, 0.1, 0.35, 0.7, 1.0):
        budget = lightest + share * (heaviest - lightest)
        best = min(cost for cost, weight in everything if weight <= budget)
        chosen = choose(units, budget)
        assert chosen is not None
        cost, weight = totals(units, chosen)
        assert weight <= budget
        assert cost <= best * (1 + 1e-4) + 1e-12


def test_a_budget_below_the_lightest_choice_is_answered_with_none() -> None:
    units = problem(0)
    lightest = sum(min(option.weight for option in unit) for unit in units)
    assert choose(units, lightest - 1) is None
    assert choose(units, lightest) is not None


def test_a_budget_is_held_to_the_byte_in_a_file_of_gigabytes() -> None:
    draw = random.Random(1)
    units = [
        [
            Option(draw.random() * 4.0**-rate, float(draw.randrange(10**7, 10**8) * (2 + rate)))
            for rate in range(6)
        ]
        for _ in range(60)
    ]
    for budget in (6_000_000_001, 9_876_543_210, 15_000_000_000):
        chosen = choose(units, budget)
        assert chosen is not None
        assert totals(units, chosen)[1] <= budget


def test_a_unit_with_one_option_keeps_it() -> None:
    units = [[Option(5.0, 100.0)], *problem(3)]
    chosen = choose(units, 1e9)
    assert chosen is not None
    assert chosen[0] == 0
    assert chosen[1:] == [3] * 5  # the highest rates, where the budget does not matter


def test_units_without_cost_are_given_least() -> None:
    units = [[Option(0.0, 10.0), Option(0.0, 20.0)]] * 3
    assert choose(units, 30.0) == [0, 0, 0]


def test_what_the_solver_prints_does_not_reach_stdout(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    def noisy(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"written to the descriptor\n")
        ctypes.CDLL(None).puts(b"printed by C, which may hold it back")
        return milp(*arguments, **options)

    monkeypatch.setattr("scipy.optimize.milp", noisy)
    print("before")
    assert choose(problem(0), 1e9) is not None
    print("after", flush=True)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_stdout_is_there_again_when_the_solver_fails(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise ValueError("no solver")

    monkeypatch.setattr("scipy.optimize.milp", failing)
    with pytest.raises(ValueError, match="no solver"):
        choose(problem(0), 1e9)
    os.write(1, b"here\n")
    assert capfd.readouterr().out == "here\n"


@pytest.mark.parametrize("trouble", ["os.close(1)", "sys.stdout = None", "sys.stdout.close()"])
def test_a_choice_is_made_without_a_stdout(trouble: str) -> None:
    program = (
        f"import os, sys; {trouble}; from ernieq.convert.milp import Option, choose; "
        "sys.exit(10 + choose([[Option(2, 1), Option(1, 2)]], 2)[0])"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 11
