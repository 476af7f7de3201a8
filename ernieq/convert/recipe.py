"""What to quantize to how many bits, and how: the recipe of a conversion.

A recipe is complete and frozen. It comes from the defaults for ``--bits``, then a ``recipe.toml``, then
options, each overriding the one before:

    bits = 2                       # the defaults to start from
    [parts]                        # bits per part; 16 keeps the source's own numbers
    attention = 4
    [modules]                      # shell patterns over module names; the last one that matches wins
    "model.layers.0.*" = 5
    [encode]
    damping = 0.01
    [calibration]
    windows = 64
    [tune]
    enabled = true
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ernieq.errors import RecipeError
from ernieq.kernels.viterbi import FULL_FIRST_PASS
from ernieq.trellis import MAX_BITS, MIN_BITS

KEEP = 16  # "bits" of a tensor that keeps the numbers of the source


class Part(StrEnum):
    """A part of the model that can be given its own number of bits."""

    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    ATTENTION = "attention"
    DENSE_MLP = "dense_mlp"
    EMBEDDING = "embedding"
    HEAD = "head"


# Bits per part for --bits 2, 3 and 4. The parts outside the routed experts are 5 % of the weights of the 21B
# model, so spending more on them is nearly free there; docs/decisions.md has what each buys.
DEFAULT_BITS: dict[int, dict[Part, int]] = {
    2: {
        Part.ROUTED_EXPERTS: 2,
        Part.SHARED_EXPERTS: 4,
        Part.ATTENTION: 4,
        Part.DENSE_MLP: 3,
        Part.EMBEDDING: 6,
        Part.HEAD: 6,
    },
    3: {
        Part.ROUTED_EXPERTS: 3,
        Part.SHARED_EXPERTS: 4,
        Part.ATTENTION: 4,
        Part.DENSE_MLP: 4,
        Part.EMBEDDING: 6,
        Part.HEAD: 6,
    },
    4: {
        Part.ROUTED_EXPERTS: 4,
        Part.SHARED_EXPERTS: 4,
        Part.ATTENTION: 4,
        Part.DENSE_MLP: 4,
        Part.EMBEDDING: 6,
        Part.HEAD: 6,
    },
}


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of the encoder.

    Args:
        state_bits: L of the trellis code; 16, or 10 to 14 for a quick try.
        damping: share of the mean diagonal added to a Hessian before it is factored.
        first_pass_steps: length of the first tail-biting pass; 96 is quicker, and 1.5 % worse at 2 bits.
        shrinkage: tokens per channel at which an expert's own Hessian counts as much as its layer's.
        correction_damping: share of the mean diagonal that restrains the correction toward the bf16 output.
    """

    state_bits: int = 16
    damping: float = 0.01
    first_pass_steps: int = FULL_FIRST_PASS
    shrinkage: float = 1.0
    correction_damping: float = 0.4


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of the calibration sample: windows, and tokens of each (never beyond the model's)."""

    windows: int = 64
    window: int = 2048


@dataclass(frozen=True)
class TuneSettings:
    """Settings of the tuning of scales and norms after rounding.

    Args:
        enabled: whether they are tuned.
        steps: steps of the optimizer, at most.
        batch_tokens: calibration tokens of a step.
        window: tokens that are seen together; windows of the calibration sample are cut into such.
        learning_rate: step size, relative to a scale or to a norm's root mean square.
    """

    enabled: bool = False
    steps: int = 100
    batch_tokens: int = 2048
    window: int = 512
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a conversion besides the source and the text.

    Args:
        bits: the ``--bits`` that the defaults were taken from.
        parts: bits of every part, 2 to 6, or 16 to keep it.
        modules: shell pattern over module names -> bits; the last match wins over ``parts``.
        encode: settings of the encoder.
        calibration: settings of the sample.
        tune: settings of the tuning after rounding.
        seed: seed of the rotation's signs and of the order of calibration documents.
    """

    bits: int
    parts: Mapping[Part, int]
    modules: Mapping[str, int] = field(default_factory=dict)
    encode: EncodeSettings = EncodeSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    tune: TuneSettings = TuneSettings()
    seed: int = 0

    def bits_of(self, module: str, part: Part) -> int:
        """Bits of one module."""
        bits = self.parts[part]
        for pattern, wanted in self.modules.items():
            if fnmatchcase(module, pattern):
                bits = wanted
        return bits

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, in the layout of ``recipe.toml``."""
        return {
            "bits": self.bits,
            "seed": self.seed,
            "parts": {str(part): bits for part, bits in self.parts.items()},
            "modules": dict(self.modules),
            "encode": dataclasses.asdict(self.encode),
            "calibration": dataclasses.asdict(self.calibration),
            "tune": dataclasses.asdict(self.tune),
        }


def default_recipe(bits: int) -> Recipe:
    """The documented recipe for ``--bits``.

    Raises:
        RecipeError: bits is not 2, 3 or 4.
    """
    if bits not in DEFAULT_BITS:
        raise RecipeError(f"--bits is {bits}; there are default recipes for {_listed(DEFAULT_BITS)}")
    return Recipe(bits, dict(DEFAULT_BITS[bits]))


def read_recipe(path: Path, bits: int | None) -> Recipe:
    """Read a ``recipe.toml`` over the defaults for ``bits`` (or for its own ``bits`` key).

    Raises:
        RecipeError: the file can't be read, is not TOML, or has a key or value that means nothing.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}") from error
    recipe = default_recipe(bits if bits is not None else raw.get("bits", 2))
    return apply_overrides(recipe, raw, str(path))


def apply_overrides(recipe: Recipe, raw: Mapping[str, Any], origin: str) -> Recipe:
    """Put values in the layout of ``recipe.toml`` over a recipe; ``origin`` names them in errors."""
    known = {"bits", "seed", "parts", "modules", "encode", "calibration", "tune"}
    if unknown := set(raw) - known:
        raise RecipeError(
            f"{origin}: unknown key {sorted(unknown)[0]!r}; known keys are {_listed(sorted(known))}"
        )
    parts = dict(recipe.parts)
    for name, bits in raw.get("parts", {}).items():
        if name not in set(Part):
            raise RecipeError(f"{origin}: {_refusal(name)}; parts are {_listed(Part)}")
        parts[Part(name)] = _checked_bits(bits, f"{origin}: parts.{name}")
    modules = dict(recipe.modules)
    for pattern, bits in raw.get("modules", {}).items():
        modules[pattern] = _checked_bits(bits, f"{origin}: modules.{pattern!r}")
    return dataclasses.replace(
        recipe,
        parts=parts,
        modules=modules,
        encode=_replaced(recipe.encode, raw.get("encode", {}), f"{origin}: encode"),
        calibration=_replaced(recipe.calibration, raw.get("calibration", {}), f"{origin}: calibration"),
        tune=_replaced(recipe.tune, raw.get("tune", {}), f"{origin}: tune"),
        seed=raw.get("seed", recipe.seed),
    )


def _refusal(name: str) -> str:
    if name in ("router", "router_bias", "gate", "norm", "norms", "bias"):
        return f"{name} is never quantized (it is small and decides too much)"
    return f"unknown part {name!r}"


def _checked_bits(bits: object, origin: str) -> int:
    if (
        not isinstance(bits, int)
        or isinstance(bits, bool)
        or not (MIN_BITS <= bits <= MAX_BITS or bits == KEEP)
    ):
        raise RecipeError(
            f"{origin} is {bits!r}; bits are {MIN_BITS} to {MAX_BITS}, or {KEEP} to keep the source"
        )
    return bits


def _replaced(settings: Any, raw: Mapping[str, Any], origin: str) -> Any:
    fields = {item.name: type(getattr(settings, item.name)) for item in dataclasses.fields(settings)}
    for name, value in raw.items():
        if name not in fields:
            raise RecipeError(f"{origin}: unknown key {name!r}; known keys are {_listed(fields)}")
        if fields[name] is bool:
            if not isinstance(value, bool):
                raise RecipeError(f"{origin}.{name} is {value!r}; it must be true or false")
            continue
        if isinstance(value, bool) or not isinstance(value, (int, fields[name])) or not value > 0:
            raise RecipeError(f"{origin}.{name} is {value!r}; it must be a positive {fields[name].__name__}")
    return dataclasses.replace(settings, **raw)


def _listed(items: Any) -> str:
    return ", ".join(str(item) for item in items)
