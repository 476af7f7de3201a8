"""A checkpoint of the Hugging Face hub: only the files that are needed, resumed where a download broke off."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ernieq.checkpoint.files import AUX_PATTERNS, CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_weight_map
from ernieq.errors import CheckpointError, StorageError

OnProgress = Callable[[str, int, int], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def looks_like_hub_id(source: str) -> bool:
    """Whether a string has the form ``organisation/name``."""
    return _HUB_ID.fullmatch(source) is not None


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
    directory = _snapshot(source, revision, [CONFIG_FILE, INDEX_FILE, *AUX_PATTERNS])
    commit = directory.name if _COMMIT.fullmatch(directory.name) else None
    report(f"downloading {source}", 1, 2)
    index = directory / INDEX_FILE
    weights = sorted(set(read_weight_map(index).values())) if index.exists() else [SINGLE_FILE]
    directory = _snapshot(source, commit or revision, weights)
    report(f"downloading {source}", 2, 2)
    return directory, commit


def _snapshot(source: str, revision: str | None, patterns: Iterable[str]) -> Path:
    import huggingface_hub  # a local directory needs none of it

    try:
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the library, its HTTP client and its transfer backend share no base class
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            raise StorageError(f"{source} can't be stored in the hub's cache: {error.strerror}") from error
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"{source} is no directory here and can't be fetched from the hub: {reason}"
        ) from error
