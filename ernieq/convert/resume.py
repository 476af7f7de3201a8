"""Begin a job in its staging directory, or go on with the one that is there if it is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ernieq.convert.identity import Identity, differences
from ernieq.convert.source_hashes import change_dates, check_touched
from ernieq.convert.staging import Staging
from ernieq.errors import JobDiffersError


def describe_job(identity: Identity, shards: Sequence[Path], **last_bits: Any) -> dict[str, Any]:
    """Contents of ``job.json``.

    Args:
        identity: what decides the bytes.
        shards: the source's files; their dates are noted.
        last_bits: numbers that decide the last bits of sums, and are kept when the job is resumed.
    """
    return {
        "identity": identity,
        "changed": change_dates(shards),
        "threads": torch.get_num_threads(),
        "last_bits": last_bits,
    }


def same_job(staging: Staging, job: dict[str, Any]) -> bool:
    """Whether the job in the staging directory is this one."""
    found = staging.job
    return found is not None and not differences(found["identity"], job["identity"])


def begin_job(
    staging: Staging, job: dict[str, Any], shards: Sequence[Path], say: Callable[[str], None]
) -> dict[str, Any]:
    """Write ``job.json``, or take the one that is there.

    Args:
        staging: the staging directory.
        job: what ``describe_job`` says of the job at hand.
        shards: the source's files.
        say: receives sentences for the user.

    Returns:
        The numbers that decide last bits, as the job was begun with.

    Raises:
        JobDiffersError: there is finished work of another job.
    """
    found = staging.job
    if found is None or not staging.has_units:
        staging.discard_job()
        staging.begin(job)
        return dict(job["last_bits"])
    if words := differences(found["identity"], job["identity"]):
        raise other_job(staging, words)
    if staging.journal.damaged:
        say(f"dropped {staging.journal.damaged} torn or damaged lines of the journal")
    check_touched(shards, found["changed"], staging.journal, say)
    tuned = job["identity"].get("recipe", {}).get("tune", {}).get("enabled", False)
    if tuned and found["threads"] != job["threads"]:
        say(
            f"this was begun with --threads {found['threads']}: with {job['threads']} what is tuned may come "
            "out with other last bits"
        )
    staging.begin(found | {"changed": job["changed"]})
    return dict(found["last_bits"])


def other_job(staging: Staging, words: str) -> JobDiffersError:
    """What to tell a user whose output has unfinished work of something else beside it."""
    return JobDiffersError(
        f"{staging.path} holds the unfinished work of something else ({words}): "
        "pass --restart to discard it, or choose another --out"
    )
