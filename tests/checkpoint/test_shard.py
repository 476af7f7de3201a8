"""Headers of safetensors files that a stranger wrote: each rule of the format has a sentence of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ernieq.checkpoint.shard import Shard
from ernieq.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        (b"[1, 2]", 0, "is corrupt: it does not begin with '{'"),
        (b"{'a': 1}", 0, "is corrupt: "),
        (b'{"a\xff": 1}', 0, "is corrupt: byte 3 is not UTF-8"),
        (b'{"a":' * 100_000, 0, "is corrupt: its JSON is nested too deep"),
        (json.dumps({"a": ENTRY}).encode()[:-1] + b',"a":{}}', 8, "the name 'a' appears twice"),
        ({"a": [1]}, 0, "a in {path} must have exactly the fields dtype, shape and data_offsets"),
        ({"a": ENTRY | {"more": 1}}, 8, "a in {path} must have exactly the fields"),
        ({"a": ENTRY | {"dtype": "F31"}}, 8, "a in {path} has dtype 'F31'; known are BOOL"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, 8, "a in {path} has dtype"),
        ({"a": ENTRY | {"shape": [-2]}}, 8, "a in {path} has no legal shape"),
        ({"a": ENTRY | {"shape": [True, 2]}}, 8, "a in {path} has no legal shape"),
        ({"a": ENTRY | {"shape": [1] * 9}}, 8, "a in {path} has no legal shape"),
        ({"a": ENTRY | {"shape": [1 << 60]}}, 8, "a in {path} has no legal shape"),
        ({"a": ENTRY | {"data_offsets": [0]}}, 8, "a in {path} has no legal data_offsets"),
        ({"a": ENTRY | {"data_offsets": [0, 8.0]}}, 8, "a in {path} has no legal data_offsets"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, 8, "its shape (2,) in F32 takes 8 bytes"),
        ({"a": ENTRY | {"shape": [3]}}, 8, "lies at bytes 0 to 8; its shape (3,) in F32 takes 12 bytes"),
        ({"a": ENTRY, "b": ENTRY}, 8, "b in {path} overlaps the tensor before it"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, 12, "a in {path} leaves a hole before it"),
        ({"a": ENTRY}, 7, "{path} is truncated"),
        ({"a": ENTRY}, 9, "no more are allowed"),
        ({"a\nb": ENTRY}, 8, "the tensor name 'a\\nb' in {path} is not a line of printable text"),
        ({"": ENTRY}, 8, "the tensor name '' in {path}"),
        (
            {"a": ENTRY, "__metadata__": {"format": 1}},
            8,
            "the __metadata__ of {path} is not an object of strings",
        ),
        ({"a": ENTRY, "__metadata__": None}, 8, "the __metadata__ of {path}"),
    ],
)
def test_a_corrupt_header_is_described(tmp_path: Path, header: Any, data: int, sentence: str) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, header, bytes(data))
    with pytest.raises(CheckpointError) as caught:
        Shard(path)
    assert sentence.replace("{path}", str(path)) in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_header_of_absurd_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 63).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="announce a header of 9223372036854775808"):
        Shard(path)
    with path.open("wb") as file:  # a sparse file of the size that it announces
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(200_000_008)
    with pytest.raises(CheckpointError, match="a header of 200000000 bytes; at most 33554432 are allowed"):
        Shard(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_header_byte_is_refused_or_read_as_a_legal_file(
    tmp_path: Path, place: int, value: int
) -> None:
    """Nothing but the error of the tree may come out, whatever byte is hit."""
    path = tmp_path / "x.safetensors"
    save_file({"alpha": torch.ones(3, 2), "beta": torch.ones(5, dtype=torch.bfloat16)}, path)
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw)
    try:
        entries = Shard(path).entries
    except CheckpointError:
        return
    assert sum(entry.end - entry.begin for entry in entries.values()) == 34
