"""The ``quantization_config`` object of ``config.json``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ernieq.errors import FormatError
from ernieq.pack.layout import (
    FORMAT_VERSION,
    QUANT_METHOD,
    READABLE_VERSIONS,
    WHOLE_RATES,
    WHOLE_RATES_VERSION,
    ModuleSpec,
    check_rotation_block,
    read_code,
)
from ernieq.pack.paths import check_tensor_name
from ernieq.pack.patterns import MAX_NAMES, compact_names, expand_names

_MODULE_KEYS = {"bits", "rotation_block", "state_bits"}
_VERSION = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})")


def is_ernieq_config(config: Mapping[str, Any]) -> bool:
    """Whether a parsed ``config.json`` says that its checkpoint is packed by ernieq."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def quantization_config(modules: Mapping[str, ModuleSpec]) -> dict[str, Any]:
    """The JSON object for a set of quantized modules; symmetric to ``parse_quantization_config``."""
    usual_state_bits = Counter(spec.code.state_bits for spec in modules.values()).most_common(1)[0][0]
    groups: dict[ModuleSpec, list[str]] = {}
    for name, spec in modules.items():
        groups.setdefault(spec, []).append(name)
    table: dict[str, dict[str, float]] = {}
    for spec, names in groups.items():
        entry: dict[str, float] = {"bits": spec.code.bits_per_weight, "rotation_block": spec.rotation_block}
        if spec.code.state_bits != usual_state_bits:
            entry["state_bits"] = spec.code.state_bits
        table.update(dict.fromkeys(compact_names(names), entry))
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "state_bits": usual_state_bits,
        "modules": dict(sorted(table.items())),
    }


def parse_quantization_config(config: Mapping[str, Any], what: str) -> dict[str, ModuleSpec]:
    """Quantized modules of a parsed ``config.json``, each with its code.

    Raises:
        FormatError: the object is missing, of another method or format version, or breaks a rule of FORMAT.md.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise FormatError(f"{what} has no quantization_config: it is not a packed checkpoint")
    method = quantization.get("quant_method")
    if method != QUANT_METHOD:
        raise FormatError(f"{what} has quant_method {str(method)[:40]!a}; this reader takes {QUANT_METHOD!a}")
    version = check_version(quantization.get("format_version"), what)
    table = quantization.get("modules")
    if not isinstance(table, dict) or not 0 < len(table) <= MAX_NAMES:
        raise FormatError(f"{what} must list 1 to {MAX_NAMES} entries in quantization_config.modules")
    modules: dict[str, ModuleSpec] = {}
    for pattern, entry in table.items():
        check_tensor_name(pattern, what)
        spec = _module_spec(entry, quantization.get("state_bits"), version, f"module {pattern[:80]} in {what}")
        for name in expand_names([pattern], what):
            if name in modules:
                raise FormatError(f"{what} lists the module {name} twice")
            modules[name] = spec
        if len(modules) > MAX_NAMES:
            raise FormatError(f"{what} lists more than {MAX_NAMES} modules")
    return modules


def check_version(version: object, what: str) -> str:
    """Return a format version that this reader knows.

    Raises:
        FormatError: it is another one; 0.x versions promise no compatibility.
    """
    if not isinstance(version, str) or version not in READABLE_VERSIONS:
        advice = ": pip install --upgrade ernieq brings one that reads more" if _is_newer(version) else ""
        raise FormatError(
            f"{what} has format version {str(version)[:20]!a}; "
            f"this ernieq reads {' and '.join(READABLE_VERSIONS)} only{advice}"
        )
    return version


def _is_newer(version: object) -> bool:
    numbers = _VERSION.fullmatch(version) if isinstance(version, str) else None
    return numbers is not None and tuple(map(int, numbers.groups())) > tuple(
        map(int, FORMAT_VERSION.split("."))
    )


def _module_spec(entry: object, usual_state_bits: object, version: str, what: str) -> ModuleSpec:
    if not isinstance(entry, dict) or not set(entry) <= _MODULE_KEYS:
        raise FormatError(f"{what} must be an object with only the keys {', '.join(sorted(_MODULE_KEYS))}")
    code = read_code(entry.get("bits"), entry.get("state_bits", usual_state_bits), what)
    if version == WHOLE_RATES_VERSION and code.bits_per_weight not in WHOLE_RATES:
        raise FormatError(
            f"{what} has {code.bits_per_weight} bits, which format version {version} does not know"
        )
    return ModuleSpec(code, check_rotation_block(entry.get("rotation_block"), what))
