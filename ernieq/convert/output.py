"""Whether a conversion may write where it is told to."""

from __future__ import annotations

import shutil
from pathlib import Path

from ernieq.checkpoint import Checkpoint
from ernieq.convert.plan import Plan
from ernieq.errors import OutputExistsError, StorageError

_SPARE_DISK_BYTES = 50_000_000


def check_place(checkpoint: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        OutputExistsError: the output is the input or inside it, or exists and ``overwrite`` is false.
    """
    target, source = out.resolve(), checkpoint.directory.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise OutputExistsError(f"the output {out} is, holds or lies in the input {checkpoint.directory}")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"the output {out} exists; pass --overwrite to replace it")


def check_output(checkpoint: Checkpoint, out: Path, plan: Plan, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something or can't hold the result.

    Raises:
        OutputExistsError: the output is the input or inside it, or exists and ``overwrite`` is false.
        StorageError: the disk has too little space.
    """
    check_place(checkpoint, out, overwrite=overwrite)
    place = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < plan.output_bytes + _SPARE_DISK_BYTES:
        raise StorageError(
            f"{place} has {free / 1e9:.2f} GB free; "
            f"the packed checkpoint needs {plan.output_bytes / 1e9:.2f} GB"
        )
