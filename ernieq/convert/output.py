"""Whether a conversion may write where it is told to."""

from __future__ import annotations

import shutil
from pathlib import Path

from ernieq.checkpoint import Checkpoint
from ernieq.convert.plain_output import refuse_overlap
from ernieq.convert.plan import Plan
from ernieq.convert.staging import staging_path
from ernieq.errors import OutputExistsError, StorageError

# Tokenizer, manifest, file system's own; and what others may write meanwhile.
SPARE_DISK_BYTES = 50_000_000


def check_place(checkpoint: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something, before anything is written beside it.

    Raises:
        OutputExistsError: the output is the input or inside it, or exists, ``overwrite`` is false, and no
            unfinished work lies beside it.
    """
    refuse_overlap(checkpoint.directory, out)
    if out.exists() and not overwrite and not staging_path(out.resolve()).exists():
        raise OutputExistsError(f"the output {out} exists; pass --overwrite to replace it")


def check_output(
    checkpoint: Checkpoint, out: Path, plan: Plan, *, overwrite: bool, staging: Path | None = None
) -> None:
    """Refuse an output that would destroy something or can't hold the result.

    Args:
        checkpoint: the source.
        out: directory to write.
        plan: what will be written.
        overwrite: whether an output may be replaced.
        staging: where units and hidden states are kept beside the output meanwhile, if they are.

    Raises:
        OutputExistsError: as ``check_place``; also for an output beside unfinished work.
        StorageError: the disk has too little space.
    """
    check_place(checkpoint, out, overwrite=overwrite)
    target = out.resolve()
    if out.exists() and not overwrite:
        raise OutputExistsError(f"the output {out} exists; pass --overwrite to replace it")
    place = next(parent for parent in target.parents if parent.exists())
    free, needed = shutil.disk_usage(place).free, needed_bytes(plan, staging)
    if free < needed + SPARE_DISK_BYTES:
        raise StorageError(
            f"{place} has {free / 1e9:.2f} GB free; "
            f"the packed checkpoint and the work towards it need {needed / 1e9:.2f} GB"
        )


def needed_bytes(plan: Plan, staging: Path | None) -> int:
    """Disk that a conversion still takes: for the output, and for what is kept beside it meanwhile."""
    if staging is None:
        return plan.output_bytes
    return plan.output_bytes + max(0, plan.output_bytes + plan.state_bytes - directory_bytes(staging))


def directory_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; none if it is not there."""
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except OSError:
        return 0


def missing_bytes(plan: Plan, staging: Path) -> int:
    """Bytes that must be freed on the disk of a staging directory before its conversion can go on."""
    # A snapshot of the states is written before the last one goes, and both are asked for before a run begins.
    needed = needed_bytes(plan, staging) + plan.state_bytes + SPARE_DISK_BYTES
    return max(0, needed - shutil.disk_usage(staging).free)
