"""Files that are whole or not there, after a kill or a loss of power too: temporary file, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ernieq.pack.atomic import storage_errors, sync_directory


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file beside its place, wait until the disk has it, and rename it there.

    Raises:
        StorageError: the disk refuses.
    """
    temporary = path.with_name(f"{path.name}.new")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except OSError:
            with suppress(OSError):  # a full disk is not to be kept full by half a file
                temporary.unlink()
            raise
