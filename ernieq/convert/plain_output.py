"""What any writing of an ordinary checkpoint looks after: place, disk, and that the result can be read back."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ernieq.errors import FormatError, OutputExistsError, StorageError, VerificationError
from ernieq.pack import read_shards

_DTYPE_KEYS = ("dtype", "torch_dtype")


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an output that is, holds or lies in the input.

    Raises:
        OutputExistsError: it does.
    """
    target, origin = out.resolve(), source.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise OutputExistsError(f"the output {out} is, holds or lies in the input {source}")


def refuse_small_disk(target: Path, nbytes: int, shard_bytes: int, what: str) -> None:
    """Refuse to begin what the disk can't hold; a shard exists twice while it is put in order.

    Raises:
        StorageError: too little space is free.
    """
    needed = nbytes + min(nbytes, shard_bytes)
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(f"{place} has {free / 1e9:.2f} GB free; {what} needs {needed / 1e9:.2f} GB")


def plain_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration of bfloat16 weights that are not quantized."""
    config = {key: raw[key] for key in raw if key != "quantization_config"}
    for key in [key for key in _DTYPE_KEYS if key in config] or _DTYPE_KEYS[-1:]:
        config[key] = "bfloat16"
    return config


def check_written(path: Path, names: Collection[str], what: str) -> None:
    """Read the headers back.

    Raises:
        VerificationError: they can't be read, or hold other tensors than they should.
    """
    try:
        found = set(read_shards(path)[0])
    except FormatError as error:
        raise VerificationError(f"{what} can't be read back: {error}") from error
    if found != set(names):
        raise VerificationError(f"{min(found ^ set(names))} is missing from {what} or was not asked for")
