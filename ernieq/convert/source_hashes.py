"""sha256 of the source's shards, worked out beside the conversion and journalled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ernieq.convert.journal import Journal
from ernieq.errors import JobDiffersError
from ernieq.pack import file_sha256

SOURCE = "source"


class _StoppedError(Exception):
    """Nobody wants the hashes any more."""


class SourceHashes:
    """Context manager that hashes files in a thread; those that the journal knows are not read again.

    Args:
        paths: the shards.
        journal: receives every hash with the time that its file was changed last.
    """

    def __init__(self, paths: Sequence[Path], journal: Journal) -> None:
        self._paths, self._journal = paths, journal
        self._hashes: dict[str, str] = {}
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
        """All hashes by file name, as soon as they are there; raises what reading a file raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
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
        changed = path.stat().st_mtime_ns
        known = known_hashes(self._journal).get(path.name)
        if known is not None and known[0] == changed:
            return known[1]
        digest = file_sha256(path, self._look_up)
        self._journal.append(SOURCE, file=path.name, changed=changed, sha256=digest)
        return digest

    def _look_up(self, _: int) -> None:
        if self._stopped.is_set():
            raise _StoppedError


def known_hashes(journal: Journal) -> dict[str, tuple[int, str]]:
    """File name -> time of its last change in nanoseconds, and hash, as journalled."""
    return {event["file"]: (event["changed"], event["sha256"]) for event in journal.events(SOURCE)}


def change_times(paths: Sequence[Path]) -> dict[str, int]:
    """File name -> time of its last change in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in paths}


def check_touched(
    paths: Sequence[Path], before: Mapping[str, int], journal: Journal, say: Callable[[str], None]
) -> None:
    """Compare the contents of shards that have another time than before with the hash that is journalled.

    Raises:
        JobDiffersError: a shard has other contents, or was touched before its hash was known.
    """
    for path in paths:
        if path.stat().st_mtime_ns == before.get(path.name):
            continue
        known = known_hashes(journal).get(path.name)
        if known is None:
            raise JobDiffersError(
                f"source shard {path.name} was touched since the conversion began, before its contents were "
                "hashed: pass --restart to begin anew"
            )
        say(f"source shard {path.name} has another date: comparing its contents")
        digest = file_sha256(path)
        if digest != known[1]:
            raise JobDiffersError(
                f"source shard {path.name} differs from what the unfinished conversion was made of: "
                "pass --restart to begin anew"
            )
        journal.append(SOURCE, file=path.name, changed=path.stat().st_mtime_ns, sha256=digest)
