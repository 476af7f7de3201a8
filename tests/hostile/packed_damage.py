"""Doing damage to a checkpoint, packed or not, and expecting a packed one to be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernieq.errors import FormatError
from ernieq.pack import file_sha256, verify_packed
from tests.hostile.refusal import refusal

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODULE = "model.layers.0.self_attn.q_proj"


def refused(path: Path, match: str | None = None, kind: type[FormatError] = FormatError) -> str:
    """Verify, expect a refusal in one sentence, and bound its time and memory."""
    return refusal(lambda: verify_packed(path), kind, match)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a shard, keep its data, and make the manifest's hash agree."""
    raw = shard.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    write_shard(shard, text + b" " * (-(8 + len(text)) % 64), raw[end:])


def write_shard(shard: Path, text: bytes, data: bytes) -> None:
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    rehash(shard)


def rehash(shard: Path) -> None:
    """Make the manifest's hash agree, if there is a manifest."""
    if not (shard.parent / "ernieq.json").exists():
        return
    edit_json(
        shard.parent / "ernieq.json",
        lambda manifest: manifest["shards"].update({shard.name: file_sha256(shard)}),
    )
