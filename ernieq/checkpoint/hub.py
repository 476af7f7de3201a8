"""A checkpoint of the Hugging Face hub: only the files that are needed, resumed where a download broke off."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ernieq.checkpoint.files import (
    AUX_PATTERNS,
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SINGLE_FILE,
    read_weight_map,
)
from ernieq.errors import CheckpointError, StorageError, UsageError

OnProgress = Callable[[str, int, int], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def looks_like_hub_id(source: str) -> bool:
    """Whether a string has the form ``organisation/name``."""
    return _HUB_ID.fullmatch(source) is not None


def locate(
    source: str | Path, *, revision: str | None = None, on_progress: OnProgress | None = None
) -> tuple[Path, str | None]:
    """The directory of a checkpoint of any kind, fetched from the hub where there is none of that name.

    Args:
        source: path of a directory, or ``organisation/name``.
        revision: branch, tag or commit on the hub.
        on_progress: called with what is being done, steps done and steps in all.

    Returns:
        The directory, and what it is a revision of: the commit on the hub, or None for a local directory.

    Raises:
        CheckpointError: it can't be found or fetched, or is a file.
        UsageError: a revision was given for a local directory.
        StorageError: the hub's cache can't be written.
    """
    directory = Path(source)
    if directory.exists():
        if not directory.is_dir():
            raise CheckpointError(f"{source} is a file; the directory of a checkpoint is needed")
        if revision is not None:
            raise UsageError(f"the revision {revision} is of no use: {source} is a local directory")
        return directory, None
    if not looks_like_hub_id(str(source)):
        raise CheckpointError(f"{source} does not exist; a directory or a hub id (organisation/name) is needed")
    directory, commit = download(str(source), revision, on_progress)
    return directory, commit or revision


def download(source: str, revision: str | None, on_progress: OnProgress | None) -> tuple[Path, str | None]:
    """Fetch a checkpoint into the hub's cache.

    The small files come first: they say which weight files there are, and fix the commit for the second step.

    Args:
        source: ``organisation/name``.
        revision: branch, tag or commit; the main branch if None.
        on_progress: called with what is being done, steps done and steps in all.

    Returns:
        The directory, and the commit (None if the cache does not name it).

    Raises:
        CheckpointError: the hub can't be reached or has no such checkpoint.
        StorageError: the cache can't be written.
    """
    report = on_progress or (lambda _label, _done, _total: None)
    report(f"downloading {source}", 0, 2)
    directory, commit = fetch_small_files(source, revision)
    report(f"downloading {source}", 1, 2)
    directory = _snapshot(source, commit or revision, weight_files(directory))
    report(f"downloading {source}", 2, 2)
    return directory, commit


def fetch_small_files(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Fetch everything but the weights; arguments, result and errors as `download`."""
    directory = _snapshot(source, revision, [CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *AUX_PATTERNS])
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(f"{source} on the hub is no checkpoint: it holds no {CONFIG_FILE}")
    return directory, directory.name if _COMMIT.fullmatch(directory.name) else None


def weight_files(directory: Path) -> list[str]:
    """Names of the weight files that an index calls for, or of the one file where there is none."""
    index = directory / INDEX_FILE
    return sorted(set(read_weight_map(index).values())) if index.exists() else [SINGLE_FILE]


def _snapshot(source: str, revision: str | None, patterns: Iterable[str]) -> Path:
    import huggingface_hub  # a local directory needs none of it

    from ernieq.checkpoint.hub_errors import hub_sentence

    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the library, its HTTP client and its transfer backend share no base class
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            raise StorageError(f"{source} can't be stored in the hub's cache: {error.strerror}") from error
        raise CheckpointError(hub_sentence(error, source, revision)) from error
