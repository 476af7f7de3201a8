"""The journal of a job: what has been finished, one JSON object a line, each with a checksum of its own.

Lines are only ever appended, and each waits for the disk. What a kill tears is at most the last line, which its
checksum gives away; it is dropped, and the work that it stood for is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from ernieq.pack import storage_errors

_CHECK = "check"


class Journal:
    """An append-only file of events. Appending is safe from several threads.

    Args:
        path: the file; created if need be.

    Raises:
        StorageError: the disk refuses.

    Attributes:
        damaged: lines that were found to be torn or altered, and are ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self.damaged = 0
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._file = os.fdopen(descriptor, "rb+", buffering=0)
            self._read()

    def append(self, event: str, **facts: Any) -> None:
        """Append an event and wait until the disk has it.

        Raises:
            StorageError: the disk refuses.
        """
        entry = {"event": event, **facts}
        line = memoryview(_line(entry))
        with self._lock, storage_errors(self._path):
            before = os.fstat(self._file.fileno()).st_size
            try:
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                with suppress(OSError):  # half a line would spoil the next one, if the disk takes one again
                    self._file.truncate(before)
                raise
            self._events.append(entry)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """All events of a kind, or of every kind, oldest first."""
        with self._lock:
            return [entry for entry in self._events if event in (None, entry["event"])]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        raw = self._file.read()
        lines = raw.split(b"\n")
        for line in lines[:-1]:
            self._take(line)
        if lines[-1]:  # no line end: torn
            self.damaged += 1
            self._file.truncate(len(raw) - len(lines[-1]))
            os.fsync(self._file.fileno())

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            check = entry.pop(_CHECK)
        except (ValueError, TypeError, KeyError, AttributeError):
            self.damaged += 1
            return
        if check == _checksum(entry) and isinstance(entry.get("event"), str):
            self._events.append(entry)
        else:
            self.damaged += 1


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps({**entry, _CHECK: _checksum(entry)}) + "\n").encode("ascii")


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry).encode("ascii")).hexdigest()[:16]
