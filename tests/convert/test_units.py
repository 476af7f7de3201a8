"""Every matrix that can be quantized belongs to one unit, and a pattern of the unit sets its bits alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.checkpoint import open_checkpoint
from ernieq.convert import KEEP, Part, default_recipe, make_plan
from ernieq.convert.units import allocation_units, with_rates
from tests.convert.conversions import quick_recipe

Tiny = Callable[..., Path]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1 + 5 + 2 * 7),
        ({"tied": False}, 2 + 5 + 2 * 7),
        ({"shared_experts": 0}, 1 + 5 + 2 * 5),
        ({"moe": False}, 1 + 3 * 5),
    ],
    ids=str,
)
def test_units_hold_every_matrix_once(tiny: Tiny, options: dict[str, Any], count: int) -> None:
    checkpoint, recipe = open_checkpoint(tiny(**options)), quick_recipe()
    units = allocation_units(checkpoint.config, recipe, ())
    assert len(units) == count
    modules = [module for unit in units for module in unit.modules]
    assert sorted(modules) == sorted(make_plan(checkpoint, recipe).modules)


def test_the_rate_of_a_unit_reaches_its_matrices_and_no_other(tiny: Tiny) -> None:
    checkpoint, recipe = open_checkpoint(tiny(tied=False)), quick_recipe()
    units = allocation_units(checkpoint.config, recipe, ())
    for chosen in units:
        rates = {unit.name: 5.0 if unit is chosen else 3.0 for unit in units}
        plan = make_plan(checkpoint, with_rates(recipe, units, rates))
        assert {module for module, bits in plan.modules.items() if bits == 5} == set(chosen.modules)


def test_pinned_parts_and_modules_have_one_rate(tiny: Tiny) -> None:
    config = open_checkpoint(tiny()).config
    recipe = quick_recipe(
        parts={Part.ATTENTION: 5}, modules={"*.experts.2.up_proj": 4, "model.layers.0.mlp.*": KEEP}
    )
    units = {unit.name: unit for unit in allocation_units(config, recipe, [Part.ATTENTION])}
    assert units["layers.1.self_attn.o_proj"].rates == (5,)
    assert units["layers.0.mlp.down_proj"].rates == (KEEP,)
    free = units["layers.1.mlp.experts.*.gate_proj+up_proj"]
    held = units["layers.1.mlp.experts.*.gate_proj+up_proj at 4 bits"]
    assert held.modules == ["model.layers.1.mlp.experts.2.up_proj"]
    assert held.rates == (4,)
    assert len(free.rates) > 1
    assert "model.layers.1.mlp.experts.2.up_proj" not in free.modules
    assert "model.layers.1.mlp.experts.2.gate_proj" in free.modules


def test_rates_that_the_state_is_too_short_for_are_left_out(tiny: Tiny) -> None:
    config = open_checkpoint(tiny()).config
    short = allocation_units(config, quick_recipe(), ())
    full = allocation_units(config, default_recipe(2), ())
    assert max(short[1].rates) == 5
    assert (min(full[1].rates), max(full[1].rates)) == (1.5, 8)
    assert full[0].rates[-2:] == (8, KEEP)
