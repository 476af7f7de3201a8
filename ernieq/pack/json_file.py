"""Strict reading and writing of JSON files: UTF-8, bounded size and depth, no duplicate keys, no NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from ernieq.errors import FormatError
from ernieq.pack.paths import locate

# A header of this size names some 120,000 tensors in one shard, ten times what a 300 B model needs; reading it
# takes well under a second. More is a mistake or an attack.
MAX_JSON_BYTES = 16 * 1024 * 1024

# Half of a surrogate pair, escaped: legal JSON, but no text can hold it, and printing it would fail.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse an object.

    Args:
        raw: the bytes of the text.
        what: how an error calls it, usually the file name.

    Raises:
        FormatError: not UTF-8, not JSON, a duplicate key, NaN or infinity, nested too deep, or not an object.
    """
    try:
        value = json.loads(
            raw.decode("utf-8", errors="strict"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None
    except RecursionError:
        raise FormatError(f"{what} nests its JSON deeper than any ernieq file does") from None
    except ValueError as error:
        raise FormatError(f"{what} is not strict JSON: {error}") from None
    if _SURROGATE_ESCAPE.search(raw) and not _is_text(value):
        raise FormatError(f"{what} holds half of a surrogate pair, which is no text")
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds a JSON {type(value).__name__} where an object is called for")
    return value


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """Read one JSON file of a checkpoint directory.

    Raises:
        FormatError: the file is missing, leads outside the directory, is too large, or is not a strict object.
    """
    path = locate(directory, name)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path} can't be read: {error.strerror}") from None
    if len(raw) > MAX_JSON_BYTES:
        raise FormatError(f"{path} is larger than {MAX_JSON_BYTES} bytes, the most that a JSON file may have")
    return parse_json_object(raw, str(path))


def dump_json(value: dict[str, Any]) -> bytes:
    """Bytes of a JSON file for people: indented, ending in a newline, keys in the order given.

    Raises:
        FormatError: the value holds NaN, infinity or something that JSON has no word for.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise FormatError(f"a JSON file can't be written: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
