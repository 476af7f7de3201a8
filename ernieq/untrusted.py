"""Files of strangers: regular ones inside their own directory, and JSON that is strict and bounded.

Whoever reads a checkpoint, packed or not, reads it through here, with an error class of its own. Nothing waits
(a pipe is refused, not opened), nothing is read that is longer than allowed, and what is parsed takes little
more memory than its text.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ernieq.errors import ErnieqError

# A header of 16 MiB names at most some 140,000 tensors, with three brackets, four colons and seven commas each.
# Counting these in the bytes bounds the objects that parsing can make, before any is made.
_MOST = {b"[{": 1 << 19, b":": 3 << 18, b",": 1 << 20}
_MAX_DEPTH = 32  # a configuration, an index and a header need three or four levels

# Half of a surrogate pair, escaped: legal JSON, but no text can hold it, and printing it would fail.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def link_fault(directory: Path, name: str) -> str | None:
    """What is wrong with the file that a plain name in a directory stands for; None if it is in order.

    It must be a regular file inside the directory. Links into the Hugging Face cache, from
    ``snapshots/<revision>/`` to ``../../blobs/``, are the one exception.
    """
    path = directory / name
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return f"{path} is missing or can't be read"
    home = directory.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if resolved.parent not in homes:
        return f"{path} is a link to {resolved}, outside the checkpoint; only files in it are read"
    return None if stat.S_ISREG(mode) else f"{path} is not a regular file"


def open_regular(path: Path, error: type[ErnieqError]) -> BinaryIO:
    """Open a regular file for reading, unbuffered, and never wait for a writer of a pipe.

    Raises:
        ErnieqError: of the class ``error``; the file can't be opened, or is none.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as fault:
        raise error(f"{path} can't be read: {fault.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_regular(path: Path, most_bytes: int, error: type[ErnieqError]) -> bytes:
    """Content of a regular file that is not longer than allowed.

    Raises:
        ErnieqError: of the class ``error``; it can't be read, is no regular file, or is too long.
    """
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise error(f"{path} has {size} bytes; at most {most_bytes} are allowed in such a file")
        try:
            return file.read(size)
        except OSError as fault:
            raise error(f"{path} can't be read: {fault.strerror}") from None


def read_json_object(path: Path, most_bytes: int, error: type[ErnieqError]) -> dict[str, Any]:
    """Read a file that holds one JSON object; raises as ``read_regular`` and ``parse_json_object``."""
    return parse_json_object(read_regular(path, most_bytes, error), str(path), error)


def parse_json_object(raw: bytes, what: str, error: type[ErnieqError]) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: the bytes of the text.
        what: how an error calls it, usually the file name.
        error: the class of errors.

    Raises:
        ErnieqError: of the class ``error``; not UTF-8, not JSON, a key twice, a number that is not finite, half
            of a surrogate pair, nested too deep, too many values, or not an object.
    """
    for marks, most in _MOST.items():
        if sum(raw.count(mark) for mark in marks) > most:
            raise error(f"{what} holds more than {most} of '{marks.decode()}'; no checkpoint needs so many")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as fault:
        raise error(f"{what} is corrupt: byte {fault.start} is not UTF-8") from None
    except RecursionError:
        raise error(f"{what} is corrupt: its JSON is nested too deep") from None
    except ValueError as fault:
        raise error(f"{what} is corrupt: {fault}") from None
    if not isinstance(value, dict):
        raise error(f"{what} holds a JSON {type(value).__name__}; an object is needed")
    if _is_deeper(value, _MAX_DEPTH):
        raise error(f"{what} is corrupt: its JSON is nested too deep")
    if _SURROGATE_ESCAPE.search(raw) and not _is_text(value):
        raise error(f"{what} is corrupt: it holds half of a surrogate pair, which is no text")
    return value


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep the garbage collector from looking through a table again and again while it grows.

    What is parsed holds no cycles, so there is nothing for it to find; a header of a hundred thousand tensors
    is read in half the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:100]!a} appears twice")
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is beyond the range of floats")
    return value


def _is_deeper(value: dict[str, Any], depth: int) -> bool:
    """Whether containers nest beyond a depth; level by level, because a recursion would end there."""
    level: list[Any] = [value]
    for _ in range(depth):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
