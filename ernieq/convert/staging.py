"""The directory beside an output that holds a job's finished work until the output is whole: ``<out>.partial``.

    lock            held while a process works here; says which one
    job.json        what decides the bytes of the output (``identity.py``)
    journal.jsonl   what has been finished (``journal.py``)
    pace.json       how long it was announced to take (``pace.py``)
    units/          encoded matrices
    state/          hidden states between two layers
    sample/         calibration tokens
    packed/         the output while it is put together
    replaced/       the output of an earlier command while the new one takes its place

It is removed when the output is whole, and when there is nothing in it to go on with.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from ernieq.convert.journal import Journal
from ernieq.convert.source_hashes import SOURCE
from ernieq.errors import OutputExistsError, OutputLockedError, StorageError
from ernieq.pack import MANIFEST_NAME, REPLACED, file_sha256, storage_errors, write_durably
from ernieq.pack.atomic import sync_directory

ALLOCATION, PACE = "allocation.json", "pace.json"
_LOCK, _JOB, _JOURNAL = "lock", "job.json", "journal.jsonl"
_PUBLISHED = "published"
SAMPLE = "sample"
_LOCK_ATTEMPTS = 100  # more than one is needed only if another process ends at this moment


def staging_path(out: Path) -> Path:
    """The staging directory of an output."""
    return out.with_name(f"{out.name}.partial")


class Staging:
    """Context manager that holds the staging directory of an output, and its lock.

    Args:
        out: the output.
        restart: whether work of an earlier run is discarded.

    Raises:
        OutputLockedError: another process works on the same output.
        OutputExistsError: there is a directory of that name which ernieq has not made.
        StorageError: the disk refuses.

    Attributes:
        out: the output, symbolic links followed.
        path: the staging directory.
        journal: what has been finished; open while the context is.
    """

    def __init__(self, out: Path, *, restart: bool = False) -> None:
        self.out = Path(os.path.realpath(out))
        self.path = staging_path(self.out)
        self._restart = restart
        self._new_parents: list[Path] = []
        self._lock: BinaryIO | None = None
        self.journal: Journal

    def __enter__(self) -> Self:
        with storage_errors(self.path):
            self._make()
            self._lock = self._locked()
        try:
            self._put_back_replaced()
            if self._restart or not (self.path / _JOB).exists():
                self._discard()
            self.journal = Journal(self.path / _JOURNAL)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._lock is not None and not self.has_work:
                # An error on its way says more than that the same disk lets nothing be removed.
                with suppress(*() if error is None else (StorageError,)):
                    self.remove()
        finally:
            self.journal.close()
            self._unlock()

    @property
    def has_units(self) -> bool:
        """Whether the job has finished any unit of work; hashes and tokens are none."""
        return any(entry["event"] not in (SOURCE, SAMPLE) for entry in self.journal.events())

    @property
    def has_work(self) -> bool:
        """Whether anything is there that a later run can go on with."""
        return self.has_units or (self.path / ALLOCATION).exists()

    @property
    def job(self) -> dict[str, Any] | None:
        """What ``job.json`` says; None if there is no job yet."""
        return self.read_json(_JOB)

    def begin(self, job: Mapping[str, Any]) -> None:
        """Write ``job.json``."""
        self.write_json(_JOB, job)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """An object from a file of this directory; None if it is not there or holds none.

        Raises:
            StorageError: the disk refuses, which must not be taken for a job that never began.
        """
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        except OSError as error:
            raise StorageError(f"can't read {self.path / name}: {error.strerror}") from error
        return value if isinstance(value, dict) else None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an object durably."""
        write_durably(self.path / name, [(json.dumps(value, indent=1) + "\n").encode("ascii")])

    def folder(self, name: str) -> Path:
        """A folder of this directory, made if need be."""
        path = self.path / name
        with storage_errors(path):
            path.mkdir(exist_ok=True)
        return path

    def announce(self, sha256: str, name: str = MANIFEST_NAME) -> None:
        """Journal that the output, known by the hash of that file in it, is about to be published."""
        self.journal.append(_PUBLISHED, file=name, sha256=sha256)

    @property
    def published(self) -> bool:
        """Whether the output is there and is the one that this job has made."""
        for event in self.journal.events(_PUBLISHED)[-1:]:
            file = self.out / event["file"]
            return file.is_file() and file_sha256(file) == str(event["sha256"])
        return False

    def publish(self, folder: Path) -> None:
        """Put a folder of this directory in the place of the output, and what was there aside.

        Raises:
            StorageError: the disk refuses.
        """
        replaced = self.path / REPLACED
        with storage_errors(self.out):
            if replaced.exists():
                shutil.rmtree(replaced)
            if self.out.exists():
                self.out.rename(replaced)
            folder.rename(self.out)
            sync_directory(self.out.parent)

    def remove(self) -> None:
        """Delete the directory; a process that is killed meanwhile leaves one that is known to be finished."""
        with storage_errors(self.path):
            for folder in [entry for entry in self.path.iterdir() if entry.is_dir()]:
                shutil.rmtree(folder)
            for name in (ALLOCATION, PACE, _JOURNAL, _JOB, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path)
        self._unlock()
        for parent in reversed(self._new_parents):
            try:
                parent.rmdir()
            except OSError:  # the output is in it
                break

    def discard_job(self) -> None:
        """Drop the job and all its work, and keep the lock and the allocation."""
        self.journal.close()
        with storage_errors(self.path):
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
            (self.path / _JOURNAL).unlink(missing_ok=True)
            (self.path / _JOB).unlink(missing_ok=True)
        self.journal = Journal(self.path / _JOURNAL)

    def _make(self) -> None:
        for parent in reversed([parent for parent in self.path.parents if not parent.exists()]):
            parent.mkdir(exist_ok=True)
            self._new_parents.append(parent)
        if self.path.exists() and not self.path.is_dir():
            raise OutputExistsError(f"{self.path} is a file; unfinished work would be kept under that name")
        if self.path.is_dir() and not (self.path / _LOCK).exists() and any(self.path.iterdir()):
            raise OutputExistsError(
                f"{self.path} is no unfinished work of ernieq, which would be kept under that name: "
                "move it, or choose another --out"
            )
        self.path.mkdir(exist_ok=True)

    def _locked(self) -> BinaryIO:
        """The lock file, locked: the one that the directory holds, and not one that was just removed."""
        for _ in range(_LOCK_ATTEMPTS):
            self.path.mkdir(exist_ok=True)
            file = os.fdopen(os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666), "rb+", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read(200).decode("utf-8", errors="replace").strip() or "another process"
                file.close()
                raise OutputLockedError(
                    f"{self.out} is being written by {holder}: wait for it, or choose another --out"
                ) from None
            if _same_file(file, self.path / _LOCK):
                with suppress(OSError):  # a full disk: the lock holds without a name too
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return file
            file.close()
        raise StorageError(f"{self.path / _LOCK} can't be locked: it is replaced again and again")

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _put_back_replaced(self) -> None:
        """Undo a replacement of the output that was killed half way."""
        replaced = self.path / REPLACED
        if replaced.exists() and not self.out.exists():
            with storage_errors(self.out):
                replaced.rename(self.out)

    def _discard(self) -> None:
        with storage_errors(self.path):
            for entry in [entry for entry in self.path.iterdir() if entry.name != _LOCK]:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _same_file(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
