"""sha256 of the source's shards, worked out beside the conversion and journalled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ernieq.convert.journal import Journal
from ernieq.errors import JobDiffersError, SourceChangedError
from ernieq.pack import file_sha256

SOURCE = "source"


class _StoppedError(Exception):
    """Nobody wants the hashes any more."""


class SourceHashes:
    """Context manager that hashes files in a thread; those that the journal knows are not read again.

    Args:
        paths: the shards.
        journal: receives every hash with the dates of its file.
        check: raises unless all files are still those whose headers were read.
    """

    def __init__(self, paths: Sequence[Path], journal: Journal, check: Callable[[], None]) -> None:
        self._paths, self._journal, self._check = paths, journal, check
        self._hashes: dict[str, str] = {}
        self._dates: dict[str, str] = {}
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ernieq-hashes", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def result(self) -> dict[str, str]:
        """All hashes by file name, as soon as they are there.

        Raises:
            SourceChangedError: a file is gone, or its contents are no longer what they were.
            StorageError: the journal can't be written.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._check()
        for path in self._paths:
            if _dates(path) != self._dates[path.name] and _content_hash(path) != self._hashes[path.name]:
                raise SourceChangedError(f"{path} changed while it was in use: its sha256 is another")
        return self._hashes

    def _work(self) -> None:
        try:
            for path in self._paths:
                self._hashes[path.name] = self._hash_of(path)
        except _StoppedError:
            pass
        except BaseException as error:
            self._error = error

    def _hash_of(self, path: Path) -> str:
        changed = self._dates[path.name] = _dates(path)
        known = known_hashes(self._journal).get(path.name)
        if known is not None and known[0] == changed:
            return known[1]
        digest = _content_hash(path, self._look_up)
        self._check()  # units were made of these files: the hash of others must not be journalled beside them
        self._journal.append(SOURCE, file=path.name, changed=changed, sha256=digest)
        return digest

    def _look_up(self, _: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError


def known_hashes(journal: Journal) -> dict[str, tuple[str, str]]:
    """File name -> dates and hash, as journalled."""
    return {event["file"]: (event["changed"], event["sha256"]) for event in journal.events(SOURCE)}


def change_dates(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> dates that differ once the file has been written to, or another put in its place.

    Raises:
        SourceChangedError: a file is gone.
    """
    return {path.name: _dates(path) for path in paths}


def check_touched(
    paths: Sequence[Path], before: Mapping[str, str], journal: Journal, say: Callable[[str], None]
) -> None:
    """Compare the contents of shards that have other dates than before with the hash that is journalled.

    Raises:
        JobDiffersError: a shard has other contents, or was touched before its hash was known.
    """
    for path in paths:
        dates = _dates(path)
        if dates == before.get(path.name):
            continue
        known = known_hashes(journal).get(path.name)
        if known is None:
            raise JobDiffersError(
                f"source shard {path.name} was touched since the conversion began, before its contents were "
                "hashed: pass --restart to begin anew"
            )
        say(f"source shard {path.name} has another date: comparing its contents")
        digest = _content_hash(path)
        if digest != known[1]:
            raise JobDiffersError(
                f"source shard {path.name} differs from what the unfinished conversion was made of: "
                "pass --restart to begin anew"
            )
        journal.append(SOURCE, file=path.name, changed=dates, sha256=digest)


def _dates(path: Path) -> str:
    """When contents and anything else of a file were changed last: nobody can set the second one back."""
    try:
        status = path.stat()
    except OSError as error:
        raise SourceChangedError(f"{path} can't be read: {error.strerror}") from error
    return f"{status.st_mtime_ns} {status.st_ctime_ns}"


def _content_hash(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    try:
        return file_sha256(path, on_bytes)
    except OSError as error:
        raise SourceChangedError(f"{path} can't be read: {error.strerror}") from error
