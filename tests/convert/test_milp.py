"""The choice of rates is the best there is, and never beyond the budget."""

from __future__ import annotations

import itertools
import random

import pytest

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
