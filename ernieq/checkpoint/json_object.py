"""JSON objects of a checkpoint: parsed without surprises, whatever a stranger has put into the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernieq.errors import CheckpointError

# The index of a 300 B model has 6 MB; what is beyond this is no configuration and no index.
_MAX_FILE_BYTES = 100_000_000


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse an object whose keys are all different.

    Args:
        raw: UTF-8 text.
        what: how an error calls it.

    Raises:
        CheckpointError: not UTF-8, not JSON, a key twice, nested too deep, or not an object.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is corrupt: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise CheckpointError(f"{what} is corrupt: its JSON is nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{what} is corrupt: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}; an object is needed")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one object.

    Raises:
        CheckpointError: the file is missing, too large, or ``parse_json_object`` refuses it.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {_MAX_FILE_BYTES} are allowed")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    return parse_json_object(raw, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key[:100]!a} appears twice")
        result[key] = value
    return result
