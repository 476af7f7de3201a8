"""What decides the bytes of a conversion, and what is said when it is not the same as before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ernieq
from ernieq.calibrate import TextFile
from ernieq.checkpoint import Checkpoint
from ernieq.convert.recipe import Recipe
from ernieq.convert.workplace import Workplace

# Packages and files whose code decides bytes, relative to the package.
_DECIDING = ("trellis", "kernels", "model", "checkpoint", "calibrate", "encode", "pack", "convert")
_CODE_SUFFIXES = (".py", ".cpp", ".hpp", ".inl", ".cu")
_PREFIX_BYTES = 8
_NAMED = 4  # differences that are listed

Identity = dict[str, Any]


def program_identity() -> Identity:
    """Versions, and a hash of the code that decides bytes."""
    digest, root = hashlib.sha256(), Path(ernieq.__file__).parent
    for folder in _DECIDING:
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in _CODE_SUFFIXES):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return {"ernieq": ernieq.__version__, "code": digest.hexdigest(), "torch": torch.__version__}


def source_identity(checkpoint: Checkpoint) -> Identity:
    """Configuration, and size and header of every shard: what can be read at once of any model."""
    config = (checkpoint.directory / "config.json").read_bytes()
    shards = {path.name: _header_identity(path) for path in checkpoint.shard_files()}
    return {"config.json": hashlib.sha256(config).hexdigest(), **shards}


def text_identity(texts: Sequence[TextFile]) -> Identity:
    """Names and hashes of texts, in their order."""
    return {f"{place}: {text.path.name}": text.sha256 for place, text in enumerate(texts, 1)}


def job_identity(
    checkpoint: Checkpoint, recipe: Recipe, calibration: Identity, workplace: Workplace
) -> Identity:
    """All that decides the bytes of a conversion: program, source, recipe, text and device."""
    return {
        "program": program_identity(),
        "source": source_identity(checkpoint),
        "recipe": json.loads(json.dumps(recipe.to_dict())),
        "text": calibration,
        "device": {"name": workplace.name, "search_arithmetic": workplace.search_arithmetic},
    }


def digest_of(identity: Mapping[str, Any]) -> str:
    """sha256 (hex) of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode("ascii")).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences of two identities in words; empty if there are none."""
    found = [words for kind in now for words in _differing(kind, before.get(kind, {}), now[kind])]
    more = len(found) - _NAMED
    return "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _differing(kind: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) == new.get(key):
            continue
        if kind == "source":
            yield f"source {key if key == 'config.json' else 'shard ' + key} differs"
        elif kind == "text":
            name = key.partition(": ")[2] or key
            yield (
                f"text {name} changed"
                if key in old and key in new
                else f"text {name} " + ("was not there before" if key in new else "is no longer there")
            )
        elif key == "code":
            yield "written by another build of ernieq"
        elif key == "ernieq":
            yield f"written by ernieq {old.get(key)}"
        else:
            yield f"{kind}: {key} {_shown(old.get(key))} -> {_shown(new.get(key))}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _header_identity(path: Path) -> str:
    with path.open("rb") as file:
        prefix = file.read(_PREFIX_BYTES)
        header = file.read(int.from_bytes(prefix, "little"))
    return f"{path.stat().st_size} bytes, header {hashlib.sha256(prefix + header).hexdigest()}"
