"""Kills a process that is none: from one operation of the disk on, every further one fails.

What a kill leaves behind is what the disk has at that moment: nobody cleans up. So the fault is no
``Exception``, and what catches it all the same (a context that is left) finds the disk gone.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from typing import Any

import pytest

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


def _tear(descriptor: int) -> None:
    """Cut off a few bytes, as many as a line of the journal is sure to have."""
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size > 7:
        os.truncate(descriptor, status.st_size - 7)
