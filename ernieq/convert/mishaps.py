"""What is said when the machine cuts a conversion short: what happened, what to do, and what is kept."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ernieq.errors import BackendUnavailableError, SourceChangedError, StorageError, memory_fault
from ernieq.records import format_bytes

_MEMORY_REMEDY = "end other programs, or raise the limit of the container,"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def mishaps_told(kept: Callable[[], str], missing_bytes: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Raise errors of disk, memory and source again with what to do, and with what has been finished.

    Args:
        kept: what is finished and where it is; empty if nothing is.
        missing_bytes: what must be freed before the work fits on its disk.

    Raises:
        StorageError: the disk refuses.
        SourceChangedError: the source vanished or changed.
        BackendUnavailableError: there is too little memory.
    """
    try:
        yield
    except StorageError as error:
        raise StorageError(_advised(error, _remedy(error, missing_bytes), kept)) from error
    except SourceChangedError as error:
        raise SourceChangedError(_advised(error, "put the file back as it was", kept)) from error
    except Exception as error:
        words = memory_fault(error)
        if words is None:
            raise
        raise BackendUnavailableError(_advised(words, _MEMORY_REMEDY, kept)) from error


def _remedy(error: StorageError, missing_bytes: Callable[[], int]) -> str:
    number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    if number in _FULL:
        try:
            count = missing_bytes()
        except OSError:
            count = 0
        # A hundredth more, as three digits may be rounded down.
        return f"free {format_bytes(count + count // 100)} there" if count else "free some space there"
    return "make it writable" if number in _REFUSED else "see to the disk"


def _advised(error: Exception | str, remedy: str, kept: Callable[[], str]) -> str:
    found = kept()
    return f"{error}; {remedy} and run the same command again" + (f": {found}" if found else "")
