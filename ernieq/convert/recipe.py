"""What to quantize to how many bits, and how: the recipe of a conversion.

A recipe is complete and frozen. It comes from the defaults for ``--bits``, then a ``recipe.toml``, then
options, each overriding the one before:

    bits = 2.5                     # the defaults to start from
    [parts]                        # bits per part, halves too; 16 keeps the source's own numbers
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
from typing import Any, TypeGuard

from ernieq.errors import RecipeError
from ernieq.kernels.viterbi import FULL_FIRST_PASS, check_first_pass
from ernieq.trellis import RATES
from ernieq.untrusted import read_regular

_MOST_RECIPE_BYTES = 1 << 20
_MOST = 1 << 31  # of a number in a recipe: far above what means anything
KEEP = 16  # "bits" of a tensor that keeps the numbers of the source
BITS_ALLOWED = f"1.5 to 6 in halves, 7, 8, or {KEEP} to keep the source"


class Part(StrEnum):
    """A part of the model that can be given its own number of bits."""

    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    ATTENTION = "attention"
    DENSE_MLP = "dense_mlp"
    EMBEDDING = "embedding"
    HEAD = "head"


# Bits per part for every --bits. The parts outside the routed experts are 5 % of the weights of the 21B model,
# so spending more on them is nearly free there; docs/decisions.md has what each buys at 2, 3 and 4, on which
# the other rows lean.
_DEFAULT_COLUMNS = (
    Part.ROUTED_EXPERTS, Part.SHARED_EXPERTS, Part.ATTENTION, Part.DENSE_MLP, Part.EMBEDDING, Part.HEAD,
)  # fmt: skip
_DEFAULT_ROWS: tuple[tuple[float, ...], ...] = (
    (1.5, 4, 4, 3, 6, 6),
    (2, 4, 4, 3, 6, 6),
    (2.5, 4, 4, 4, 6, 6),
    (3, 4, 4, 4, 6, 6),
    (3.5, 5, 5, 5, 6, 6),
    (4, 4, 4, 4, 6, 6),
    (4.5, 5, 5, 5, 8, 8),
    (5, 5, 5, 5, 8, 8),
    (5.5, 5.5, 5.5, 5.5, 8, 8),
    (6, 6, 6, 6, 8, 8),
)
DEFAULT_BITS: dict[float, dict[Part, float]] = {
    row[0]: dict(zip(_DEFAULT_COLUMNS, row, strict=True)) for row in _DEFAULT_ROWS
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

    Raises:
        UsageError: first_pass_steps is no multiple of 4 from 4 to 256.
    """

    state_bits: int = 16
    damping: float = 0.01
    first_pass_steps: int = FULL_FIRST_PASS
    shrinkage: float = 1.0
    correction_damping: float = 0.4

    def __post_init__(self) -> None:
        check_first_pass(self.first_pass_steps)


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
        learning_rate: step size at 2 bits, relative to a scale, or to the root mean square of a norm or a
            router; a tenth of it at 4 bits.
        routers: whether routers are tuned with scales and norms.
    """

    enabled: bool = False
    steps: int = 100
    batch_tokens: int = 2048
    window: int = 512
    learning_rate: float = 2e-3
    routers: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a conversion besides the source and the text.

    Args:
        bits: the ``--bits`` that the defaults were taken from.
        parts: bits of every part, a rate of the trellis code or 16 to keep it.
        modules: shell pattern over module names -> bits; the last match wins over ``parts``.
        encode: settings of the encoder.
        calibration: settings of the sample.
        tune: settings of the tuning after rounding.
        seed: seed of the rotation's signs and of the order of calibration documents.
    """

    bits: float
    parts: Mapping[Part, float]
    modules: Mapping[str, float] = field(default_factory=dict)
    encode: EncodeSettings = EncodeSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    tune: TuneSettings = TuneSettings()
    seed: int = 0

    def bits_of(self, module: str, part: Part) -> float:
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


def default_recipe(bits: float) -> Recipe:
    """The documented recipe for ``--bits``.

    Raises:
        RecipeError: bits is not 1.5 to 6 in halves.
    """
    if not _is_number(bits) or bits not in DEFAULT_BITS:
        raise RecipeError(f"--bits is {_shown(bits)}; there are default recipes for 1.5 to 6 bits in halves")
    parts = DEFAULT_BITS[bits]
    return Recipe(parts[Part.ROUTED_EXPERTS], dict(parts))


def read_recipe(path: Path, bits: float | None, preset: Mapping[str, Any] | None = None) -> Recipe:
    """Read a ``recipe.toml`` over the defaults for ``bits`` (or for its own ``bits`` key) and a preset.

    Raises:
        RecipeError: the file can't be read, is not TOML, or has a key or value that means nothing.
    """
    raw = _read_toml(path)
    recipe = default_recipe(bits if bits is not None else raw.get("bits", 2))
    return apply_overrides(apply_overrides(recipe, preset or {}, "preset"), raw, str(path))


def stated_parts(path: Path) -> list[Part]:
    """The parts whose bits a ``recipe.toml`` states; raises as ``read_recipe``, which is to be called first."""
    return [Part(name) for name in _read_toml(path).get("parts", {})]


def _read_toml(path: Path) -> dict[str, Any]:
    raw = read_regular(path, _MOST_RECIPE_BYTES, RecipeError)
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except RecursionError:
        raise RecipeError(f"recipe {path} is not TOML that can be read: it is nested too deep") from None
    except ValueError as error:  # not UTF-8, not TOML, or a number of thousands of digits
        raise RecipeError(f"recipe {path} is not TOML: {error}") from error


def apply_overrides(recipe: Recipe, raw: Mapping[str, Any], origin: str) -> Recipe:
    """Put values in the layout of ``recipe.toml`` over a recipe; ``origin`` names them in errors."""
    known = {"bits", "seed", "parts", "modules", "encode", "calibration", "tune"}
    if unknown := set(raw) - known:
        raise RecipeError(
            f"{origin}: unknown key {_shown(sorted(unknown)[0])}; known keys are {_listed(sorted(known))}"
        )
    for name in sorted(known - {"bits", "seed"}):
        if not isinstance(raw.get(name, {}), Mapping):
            raise RecipeError(f"{origin}: {name} is {_shown(raw[name])}; a table is needed")
    parts = dict(recipe.parts)
    for name, bits in raw.get("parts", {}).items():
        if name not in set(Part):
            raise RecipeError(f"{origin}: {_refusal(name)}; parts are {_listed(Part)}")
        parts[Part(name)] = _checked_bits(bits, f"{origin}: parts.{name}")
    modules = dict(recipe.modules)
    for pattern, bits in raw.get("modules", {}).items():
        modules[pattern] = _checked_bits(bits, f"{origin}: modules.{_shown(pattern)}")
    return dataclasses.replace(
        recipe,
        parts=parts,
        modules=modules,
        encode=_replaced(recipe.encode, raw.get("encode", {}), f"{origin}: encode"),
        calibration=_replaced(recipe.calibration, raw.get("calibration", {}), f"{origin}: calibration"),
        tune=_replaced(recipe.tune, raw.get("tune", {}), f"{origin}: tune"),
        seed=_checked_seed(raw.get("seed", recipe.seed), origin),
    )


def _refusal(name: str) -> str:
    if name in ("router", "router_bias", "gate", "norm", "norms", "bias"):
        return f"{name} is never quantized (it is small and decides too much)"
    return f"unknown part {_shown(name)}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked_seed(seed: object, origin: str) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise RecipeError(f"{origin}: seed is {_shown(seed)}; a whole number from 0 to 2^63 - 1 is needed")
    return seed


def _checked_bits(bits: object, origin: str) -> float:
    if not _is_number(bits) or bits not in (*RATES, KEEP):
        raise RecipeError(f"{origin} is {_shown(bits)}; bits are {BITS_ALLOWED}")
    return int(bits) if bits == int(bits) else bits


def _replaced(settings: Any, raw: Mapping[str, Any], origin: str) -> Any:
    fields = {item.name: type(getattr(settings, item.name)) for item in dataclasses.fields(settings)}
    for name, value in raw.items():
        if name not in fields:
            raise RecipeError(f"{origin}: unknown key {_shown(name)}; known keys are {_listed(fields)}")
        if fields[name] is bool:
            if not isinstance(value, bool):
                raise RecipeError(f"{origin}.{name} is {_shown(value)}; it must be true or false")
            continue
        number = isinstance(value, (int, fields[name])) and not isinstance(value, bool)
        if not number or not 0 < value < _MOST:
            raise RecipeError(
                f"{origin}.{name} is {_shown(value)}; it must be a positive {fields[name].__name__}"
            )
    return dataclasses.replace(settings, **raw)


def _listed(items: Any) -> str:
    return ", ".join(str(item) for item in items)
