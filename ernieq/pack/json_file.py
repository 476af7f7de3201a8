"""JSON files of a packed checkpoint: read as those of a stranger, written for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernieq import untrusted
from ernieq.errors import FormatError
from ernieq.pack.paths import locate

# A header of this size names some 120,000 tensors in one shard, ten times what a 300 B model needs; reading it
# takes well under a second. More is a mistake or an attack.
MAX_JSON_BYTES = 16 * 1024 * 1024


def read_json_object(directory: Path, name: str) -> dict[str, Any]:
    """Read one JSON file of a checkpoint directory.

    Raises:
        FormatError: the file is missing, leads outside the directory, is too large, or is not a strict object.
    """
    return untrusted.read_json_object(locate(directory, name), MAX_JSON_BYTES, FormatError)


def dump_json(value: dict[str, Any]) -> bytes:
    """Bytes of a JSON file for people: indented, ending in a newline, keys in the order given.

    Raises:
        FormatError: the value holds NaN, infinity or something that JSON has no word for.
    """
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise FormatError(f"a JSON file can't be written: {error}") from None
