"""Kills a process that is none, refuses operations of the disk, and lets things happen in mid-run.

What a kill leaves behind is what the disk has at that moment: nobody cleans up. So the fault is no
``Exception``, and what catches it all the same (a context that is left) finds the disk gone.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from typing import Any

import pytest

from ernieq.convert import groups

_OPERATIONS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "unlink"),
    (shutil, "rmtree"),
)


class KilledError(BaseException):
    """The process would be dead."""


class Disk:
    """Counts operations that change the disk, and fails from the ``last`` on.

    Args:
        monkeypatch: undoes it all.
        last: number of the first operation that fails, from 1. An fsync loses the end of what was written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self._last = last
        self.count = 0
        for module, name in _OPERATIONS:
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count < self._last:
                return genuine(*arguments, **options)
            if self.count == self._last and name == "fsync":
                _tear(arguments[0])
            raise KilledError(f"{name}, operation {self.count}")

        return operation


class RefusingDisk:
    """From one operation on, the disk refuses all that writes; a full one still lets files be removed.

    Args:
        monkeypatch: undoes it all.
        first: number of the first operation that is refused, from 1.
        number: the system's error number.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, number: int) -> None:
        self._first, self._number = first, number
        self.count = 0
        removing = ("unlink", "rmtree")
        for module, name in _OPERATIONS:
            if number != errno.ENOSPC or name not in removing:
                monkeypatch.setattr(module, name, self._refusing(getattr(module, name)))

    def _refusing(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count < self._first or options.get("ignore_errors"):
                return genuine(*arguments, **options)
            raise OSError(self._number, os.strerror(self._number))

        return operation


def while_encoding(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], Any]) -> None:
    """Let something happen just before matrices are encoded for that time, from 1."""
    genuine, calls = groups.__dict__["encode_matrices"], 0

    def encode(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            happens()
        return genuine(*arguments)

    monkeypatch.setattr(groups, "encode_matrices", encode)


def _tear(descriptor: int) -> None:
    """Cut off a few bytes, as many as a line of the journal is sure to have."""
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size > 7:
        os.truncate(descriptor, status.st_size - 7)
