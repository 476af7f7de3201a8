"""Bits for every unit of the model, from what its errors were measured to cost and a size or a divergence.

The predicted KL of a recipe is the sum over units of ``sensitivity * squared error of the code``; the sizes are
those of the plan. What is chosen is compared with even settings of the same size by a second measurement, in
which all errors are there at once, and the better one is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.calibrate import CalibrationSample
from ernieq.checkpoint import Checkpoint
from ernieq.convert.milp import Option, choose
from ernieq.convert.perturb import DIFFERENCE_DTYPE, Perturbed
from ernieq.convert.plan import make_plan
from ernieq.convert.probe import balanced, probe_of, typical_divergence
from ernieq.convert.recipe import DEFAULT_BITS, KEEP, Part, Recipe
from ernieq.convert.targets import Goal, Target
from ernieq.convert.unit_sizes import UnitSizes
from ernieq.convert.units import OUTER_PARTS, Unit, allocation_units, with_rates
from ernieq.convert.workplace import Workplace
from ernieq.encode import SQUARED_ERROR
from ernieq.errors import UsageError
from ernieq.records import format_significant

# The rate at whose error a unit is measured. Small errors cost more than their share, because routing flips
# with the error's size and not with its square; beside the others' errors, the share at two bits counts.
REFERENCE_RATE = 2.0

Table = list[list[tuple[float, float, int]]]  # for every unit and rate: rate, predicted KL, bytes


@dataclass(frozen=True)
class Allocation:
    """A recipe that holds a target.

    Args:
        recipe: with the chosen rates as exact patterns.
        target: what was asked for.
        predicted_kl: nats per token.
        rates: unit name -> bits.
        sensitivities: unit name -> KL per squared error of the code.
        even: whether an even setting was measured to be better than what was chosen by sensitivity.
        factor: measured over predicted KL, all errors at once.
    """

    recipe: Recipe
    target: Target
    predicted_kl: float
    rates: Mapping[str, float]
    sensitivities: Mapping[str, float]
    even: bool
    factor: float

    def record(self) -> dict[str, Any]:
        """All of it but recipe and target, as JSON; ``Allocator.recalled`` is the inverse."""
        names = ("predicted_kl", "rates", "sensitivities", "even", "factor")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {
            "target": {"goal": str(self.target.goal), "amount": self.target.amount},
            "predicted_kl": _rounded(self.predicted_kl),
            "measured_over_predicted": _rounded(self.factor),
            "even": self.even,
            "units": {
                name: {"bits": bits, "sensitivity": _rounded(self.sensitivities[name])}
                for name, bits in self.rates.items()
            },
        }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


class Allocator:
    """Measures a model once and allocates bits, for one target after another.

    Args:
        checkpoint: the model.
        recipe: what the rates are put into; its own patterns stay.
        pinned: parts that keep the recipe's bits.
        goal: a bound of the decoder alone leaves embedding and head as they are in the recipe.
        sample: the calibration sample.
        workplace: the device that measures.
        on_line: receives sentences for the user.
        on_layer: called with what is being measured, layers done and layers in all.

    Attributes:
        lightest: the plan with every unit at its lowest rate.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        pinned: Sequence[Part],
        goal: Goal,
        sample: CalibrationSample,
        workplace: Workplace,
        on_line: Callable[[str], None] = lambda _: None,
        on_layer: Callable[[str, int, int], None] = lambda *_: None,
    ) -> None:
        held = (*pinned, *OUTER_PARTS) if goal is Goal.DECODER else tuple(pinned)
        self._checkpoint, self._recipe, self._goal = checkpoint, recipe, goal
        self._units = allocation_units(checkpoint.config, recipe, held)
        rates = {unit.name: unit.rates[0] for unit in self._units}
        self.lightest = make_plan(checkpoint, with_rates(recipe, self._units, rates))
        self._sizes = UnitSizes(checkpoint, self._units, self.lightest)
        self._probe = probe_of(sample)
        self._workplace, self._on_line, self._on_layer = workplace, on_line, on_layer
        self._sensitivities: dict[str, float] | None = None

    def check(self, target: Target) -> None:
        """Refuse a size that can't be reached, before anything is measured.

        Raises:
            UsageError: it is below the smallest; the sentence names that.
        """
        if target.goal is Goal.DIVERGENCE:
            return
        rates = {unit.name: unit.rates[0] for unit in self._units}
        smallest = self._sizes.total(rates, target.goal)
        if smallest > target.limit_bytes(self._sizes.parameters):
            raise UsageError(
                f"{target.option} is too small for this model: the smallest that can be reached is "
                f"{target.smallest(smallest, self._sizes.parameters)}"
            )

    @property
    def unit_count(self) -> int:
        """Number of units that are measured."""
        return len(self._units)

    @property
    def memory_bytes(self) -> int:
        """Peak of resident memory while the model is measured: a conversion's, and a copy's states a unit."""
        states = self._probe.scored.numel() * self._checkpoint.config.hidden_size
        return self.lightest.memory_bytes + self.unit_count * states * DIFFERENCE_DTYPE.itemsize

    def allocate(self, target: Target) -> Allocation:
        """The best rates within a bound.

        Raises:
            UsageError: the target can't be reached.
        """
        if target.goal is Goal.DIVERGENCE:
            return self.allocate_divergence(target)
        self.check(target)
        limit = target.limit_bytes(self._sizes.parameters)
        chosen = self._within_bytes(limit)
        even = self._best_even(limit)
        candidates = [chosen] if even is None or even == chosen else [chosen, even]
        divergences = self._measure(candidates)
        typical, means = typical_divergence(divergences), divergences.mean(axis=1)
        best = int(typical.argmin())
        if best:
            self._on_line(
                f"an even setting is better here than rates by sensitivity (KL {typical[1]:.4f} against "
                f"{typical[0]:.4f} with emulated errors): it is kept"
            )
        return self._allocation(target, candidates[best], float(means[best]), even=bool(best))

    def allocate_divergence(self, target: Target, factor: float | None = None) -> Allocation:
        """The smallest size whose KL, ``factor`` times the predicted one, is within a bound.

        Args:
            target: the bound.
            factor: measured over predicted KL; found with emulated errors if None.

        Raises:
            UsageError: even the highest rates predict more.
        """
        if factor is None:
            first = self._within_divergence(target, 1.0)
            predicted = self._predicted(first)
            factor = float(self._measure([first]).mean()) / predicted if predicted > 0 else 1.0
        rates = self._within_divergence(target, factor)
        return self._allocation(target, rates, factor * self._predicted(rates), even=False)

    def sensitivities(self) -> dict[str, float]:
        """KL per squared error of the code for every unit, measured when first asked for."""
        if self._sensitivities is None:
            error = SQUARED_ERROR[REFERENCE_RATE]
            encoded = [unit for unit in self._units if unit.rates != (KEEP,)]
            found = self._perturbed("sensitivities").divergences(
                self._probe, [{unit.name: error} for unit in encoded]
            )
            shares = balanced(found) / error
            self._sensitivities = {unit.name: 0.0 for unit in self._units} | {
                unit.name: float(share) for unit, share in zip(encoded, shares, strict=True)
            }
        return self._sensitivities

    def recalled(self, target: Target, facts: Mapping[str, Any]) -> Allocation:
        """An allocation that an earlier run has made, from its ``record``; nothing is measured again."""
        self._sensitivities = dict(facts["sensitivities"])
        rates = dict(facts["rates"])
        recipe = with_rates(self._recipe, self._units, rates)
        even, factor = facts["even"], facts["factor"]
        return Allocation(recipe, target, facts["predicted_kl"], rates, self._sensitivities, even, factor)

    def _perturbed(self, what: str) -> Perturbed:
        return Perturbed(
            self._checkpoint,
            self._units,
            self._recipe,
            self._workplace,
            lambda done, total: self._on_layer(what, done, total),
        )

    def _measure(self, candidates: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """KL of copies of the model with all errors at once: (candidates, windows)."""
        errors = [{name: SQUARED_ERROR[rate] for name, rate in rates.items()} for rates in candidates]
        return self._perturbed("all errors at once").divergences(self._probe, errors)

    def _predicted(self, rates: Mapping[str, float]) -> float:
        sensitivities = self.sensitivities()
        return sum(sensitivities[name] * SQUARED_ERROR[rate] for name, rate in rates.items())

    def _options(self) -> Table:
        """For every unit and rate: rate, predicted KL, bytes."""
        sensitivities = self.sensitivities()
        return [
            [
                (rate, sensitivities[unit.name] * SQUARED_ERROR[rate], self._sizes.of(unit, rate, self._goal))
                for rate in unit.rates
            ]
            for unit in self._units
        ]

    def _within_bytes(self, limit: int) -> dict[str, float]:
        table = self._options()
        options = [[Option(kl, size) for _, kl, size in unit] for unit in table]
        chosen = choose(options, limit - self._sizes.fixed(self._goal))
        assert chosen is not None, "check() has refused what can't be reached"
        return self._rates(table, chosen)

    def _within_divergence(self, target: Target, factor: float) -> dict[str, float]:
        table = self._options()
        options = [[Option(size, factor * kl) for _, kl, size in unit] for unit in table]
        chosen = choose(options, target.amount)
        if chosen is None:
            least = factor * self._predicted({unit.name: unit.rates[-1] for unit in self._units})
            raise UsageError(
                f"{target.option} {target.amount:g} can't be reached: at the highest rates "
                f"{format_significant(least)} is expected"
            )
        return self._rates(table, chosen)

    def _rates(self, table: Table, chosen: Sequence[int]) -> dict[str, float]:
        places = zip(self._units, table, chosen, strict=True)
        return {unit.name: options[place][0] for unit, options, place in places}

    def _best_even(self, limit: int) -> dict[str, float] | None:
        """The even setting with the least predicted KL within the limit."""
        fitting = [rates for rates in self._even_settings() if self._sizes.total(rates, self._goal) <= limit]
        return min(fitting, key=self._predicted, default=None)

    def _even_settings(self) -> Iterator[dict[str, float]]:
        """One rate for all decoder units, another outside; and the default recipes."""
        inner = {rate for unit in self._units if unit.layer is not None for rate in unit.rates}
        outer = {rate for unit in self._units if unit.layer is None for rate in unit.rates}
        for inside, outside in product(sorted(inner), sorted(outer)):
            yield {unit.name: _nearest(unit, outside if unit.layer is None else inside) for unit in self._units}
        for parts in DEFAULT_BITS.values():
            yield {unit.name: _nearest(unit, parts[unit.part]) for unit in self._units}

    def _allocation(
        self, target: Target, rates: Mapping[str, float], measured: float, *, even: bool
    ) -> Allocation:
        predicted = self._predicted(rates)
        factor = measured / predicted if predicted > 0 else 1.0
        recipe = with_rates(self._recipe, self._units, rates)
        return Allocation(recipe, target, measured, rates, self.sensitivities(), even, factor)


def _nearest(unit: Unit, rate: float) -> float:
    return min(unit.rates, key=lambda own: (abs(own - rate), own))
