"""A directory that appears whole or not at all.

Everything is written to a hidden directory beside the target (same file system, so that the rename is atomic),
fsynced, checked and only then renamed. A target that is overwritten is set aside for the moment of the rename,
put back if the rename fails, and deleted last. A process that is killed leaves at most hidden directories
``.<name>.<token>.partial`` (unfinished) or ``.<name>.<token>.replaced`` (the old one) beside the target.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from ernieq.errors import OutputExistsError, StorageError

_CONFIG = "config.json"
UNFINISHED, REPLACED = "packed", "replaced"  # names within a staging directory


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error while writing into a StorageError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:  # nothing is wrong with the disk
            raise
        raise StorageError(f"can't write {path}: {error.strerror or error}") from error


class AtomicDirectory:
    """Context manager: write below ``path``, then ``commit``; leaving without commit removes everything.

    Args:
        target: where the directory shall appear; a symbolic link is followed.
        overwrite: whether a model directory that is there may be replaced.
        staging: an existing directory beside the target to write in, in place of hidden directories of its own:
            whoever owns it finds ``packed`` (unfinished) or ``replaced`` (the old one) there after a kill.

    Raises:
        OutputExistsError: the target exists and ``overwrite`` is false, or it is not a model directory (no
            ``config.json``) and not empty, which is never deleted.
        StorageError: the directory can't be created.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, staging: Path | None = None) -> None:
        self.target = Path(os.path.realpath(target))
        self._overwrite = overwrite
        self._new_parents: list[Path] = []
        self._committed = False
        self._refuse_existing()
        token = secrets.token_hex(4)
        self.path = self.target.with_name(f".{self.target.name}.{token}.partial")
        self._set_aside = self.target.with_name(f".{self.target.name}.{token}.replaced")
        if staging is not None:
            self.path, self._set_aside = staging / UNFINISHED, staging / REPLACED

    def __enter__(self) -> Self:
        missing = [parent for parent in self.path.parents if not parent.exists()]
        try:
            with storage_errors(self.target):
                for parent in reversed(missing):
                    parent.mkdir(exist_ok=True)
                    self._new_parents.append(parent)
                if self.path.exists():  # in a staging directory, from an attempt that was killed
                    shutil.rmtree(self.path)
                self.path.mkdir()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._discard()

    def commit(self, check: Callable[[Path], None] | None = None) -> Path:
        """Fsync all files, run ``check`` on the directory, and rename it to the target.

        Args:
            check: raises if the directory must not be published.

        Returns:
            The target.

        Raises:
            OutputExistsError: something appeared at the target in the meantime.
            StorageError: a file can't be fsynced or the directory can't be renamed.
        """
        with storage_errors(self.target):
            _fsync_tree(self.path)
        if check is not None:
            check(self.path)
        self._refuse_existing()
        with storage_errors(self.target):
            self._swap()
            self._committed = True
            sync_directory(self.target.parent)
        shutil.rmtree(self._set_aside, ignore_errors=True)
        return self.target

    def _refuse_existing(self) -> None:
        with storage_errors(self.target):
            if not self.target.exists():
                return
            if not self._overwrite:
                raise OutputExistsError(f"{self.target} exists; pass --overwrite to replace it")
            if not self.target.is_dir():
                raise OutputExistsError(f"{self.target} is a file; a model is written as a directory")
            if not (self.target / _CONFIG).exists() and any(self.target.iterdir()):
                raise OutputExistsError(
                    f"{self.target} has no {_CONFIG}; only a model directory may be overwritten"
                )

    def _swap(self) -> None:
        try:
            if self.target.exists():
                self.target.rename(self._set_aside)
            self.path.rename(self.target)
        except BaseException:
            if self._set_aside.exists() and not self.target.exists():
                self._set_aside.rename(self.target)
            raise

    def _discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self._new_parents):
            try:
                parent.rmdir()
            except OSError:  # someone else has put something there
                break


def _fsync_tree(directory: Path) -> None:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            _fsync_tree(entry)
        else:
            with entry.open("rb+") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Wait until the disk has the names in a directory."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no way to fsync a directory
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
