"""Units of allocation: the matrices that get their bits together, because a kernel reads them together.

In a layer: q and k; v; o; gate and up of the dense MLP, its down; the same of the shared experts; gate and up
of all routed experts, their downs. Outside: the embedding (a tied head is the same matrix), an untied head.

A kernel reads q, k and v together if they have one rate. They are two units all the same: a weight of v was
measured to cost 7 to 15 times as much as one of q or k, and another rate costs one launch a layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ernieq.convert.groups import EMBEDDING, HEAD, full_name
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.convert.stored import StoredGroup, layer_groups
from ernieq.errors import UsageError
from ernieq.model import ModelConfig
from ernieq.trellis import RATES, TrellisCode

DECODER_RATES: tuple[float, ...] = RATES
# Every token passes embedding and head, and at two bits either costs more than all layers together.
OUTER_RATES: tuple[float, ...] = (*(rate for rate in RATES if rate >= 3), KEEP)

OUTER_PARTS = (Part.EMBEDDING, Part.HEAD)

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Unit:
    """Matrices that get one rate.

    Args:
        name: for people and as a key: ``layers.3.mlp.experts.*.gate_proj+up_proj``.
        layer: number of the layer; None outside.
        part: of the model.
        groups: the matrices by the input that they read, with names within the layer.
        patterns: shell patterns over module names that set the bits of the unit in a recipe.
        rates: bits that it may get, rising; one if it is pinned.
    """

    name: str
    layer: int | None
    part: Part
    groups: tuple[StoredGroup, ...]
    patterns: tuple[str, ...]
    rates: tuple[float, ...] = ()

    @property
    def modules(self) -> list[str]:
        """Full names of the matrices."""
        return [full_name(self.layer, name) for group in self.groups for name in group.names]


def allocation_units(config: ModelConfig, recipe: Recipe, pinned: Collection[Part]) -> list[Unit]:
    """All units of a model, in its order.

    Args:
        config: of the model.
        recipe: gives the bits of what is pinned, and the length of the code's state, which bounds the rates.
        pinned: parts that keep the bits of the recipe. Modules that a pattern of the recipe names are pinned
            too; where these are a few of a unit's only, they become a unit of their own.
    """
    units = _outer_units(config)
    for index in range(config.num_hidden_layers):
        units += _layer_units(config, index)
    return [piece for unit in units for piece in _with_rates(unit, recipe, unit.part in pinned)]


def with_rates(recipe: Recipe, units: Sequence[Unit], rates: Mapping[str, float]) -> Recipe:
    """The recipe with the rates of units, by their names; its own patterns still win over them."""
    modules = {pattern: rates[unit.name] for unit in units if len(unit.rates) > 1 for pattern in unit.patterns}
    return dataclasses.replace(recipe, modules={**modules, **recipe.modules})


def _outer_units(config: ModelConfig) -> list[Unit]:
    parts = {EMBEDDING: Part.EMBEDDING} | ({} if config.tie_word_embeddings else {HEAD: Part.HEAD})
    return [
        Unit(name, None, part, (StoredGroup((name,), part, f"{name}.input", name),), (name,))
        for name, part in parts.items()
    ]


def _layer_units(config: ModelConfig, index: int) -> list[Unit]:
    """The groups of a layer, v apart; what differs in the number of the routed expert alone is one unit."""
    together: dict[tuple[str, ...], list[StoredGroup]] = {}
    pieces = [piece for group in layer_groups(config, index) for piece in _values_apart(group)]
    for group in pieces:
        names = tuple(_EXPERT.sub(".experts.*.", name) for name in group.names)
        together.setdefault(names, []).append(group)
    units = []
    for names, groups in together.items():
        path, _, _ = names[0].rpartition(".")
        label = f"layers.{index}.{path}." + "+".join(name.rpartition(".")[2] for name in names)
        patterns = tuple(full_name(index, name) for name in names)
        units.append(Unit(label, index, groups[0].part, tuple(groups), patterns))
    return units


def _values_apart(group: StoredGroup) -> list[StoredGroup]:
    """The group, and v of attention in one of its own."""
    values = tuple(name for name in group.names if name.endswith(".v_proj"))
    others = tuple(name for name in group.names if name not in values)
    return [dataclasses.replace(group, names=names) for names in (others, values) if names]


def _with_rates(unit: Unit, recipe: Recipe, pinned: bool) -> list[Unit]:
    """The unit with its rates; several units where patterns of the recipe pin some of its matrices."""
    by_bits: dict[float | None, set[str]] = {}
    for module in unit.modules:
        named = any(fnmatchcase(module, pattern) for pattern in recipe.modules)
        bits = recipe.bits_of(module, unit.part) if pinned or named else None
        by_bits.setdefault(bits, set()).add(module)
    return [
        Unit(
            unit.name if bits is None or len(by_bits) == 1 else f"{unit.name} at {bits:g} bits",
            unit.layer,
            unit.part,
            _groups_of(unit, modules),
            unit.patterns,
            _free_rates(unit, recipe) if bits is None else (bits,),
        )
        for bits, modules in by_bits.items()
    ]


def _groups_of(unit: Unit, modules: Collection[str]) -> tuple[StoredGroup, ...]:
    kept = []
    for group in unit.groups:
        names = tuple(name for name in group.names if full_name(unit.layer, name) in modules)
        if names:
            kept.append(StoredGroup(names, group.part, group.signs, group.gram))
    return tuple(kept)


def _free_rates(unit: Unit, recipe: Recipe) -> tuple[float, ...]:
    rates = OUTER_RATES if unit.layer is None else DECODER_RATES
    return tuple(rate for rate in rates if rate == KEEP or _has_code(rate, recipe.encode.state_bits))


def _has_code(rate: float, state_bits: int) -> bool:
    try:
        TrellisCode(rate, state_bits)
    except UsageError:
        return False
    return True
