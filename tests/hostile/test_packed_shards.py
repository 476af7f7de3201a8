"""Shards that are broken or made to do harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ernieq.errors import FormatError, VerificationError
from ernieq.pack import PackedReader
from tests.hostile.packed_damage import (
    MODULE,
    SHARD,
    edit_header,
    refused,
    rehash,
    write_shard,
)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_shard_is_refused(packed: Path, length: int) -> None:
    (packed / SHARD).write_bytes((packed / SHARD).read_bytes()[:length])
    refused(packed, SHARD)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 17 * 2**20, 10**6])
def test_a_header_length_beyond_the_file_is_refused(packed: Path, length: int) -> None:
    raw = (packed / SHARD).read_bytes()
    (packed / SHARD).write_bytes(length.to_bytes(8, "little") + raw[8:])
    refused(packed, "claims")


def test_a_huge_header_in_a_sparse_file_is_refused_unread(packed: Path) -> None:
    with (packed / SHARD).open("r+b") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**33 + 4096)
    refused(packed, "claims a header of 8589934592 bytes")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b" {}",
        b"\xff\xfe{}",
        b'{"a":"\xc3("}',
        b'{"__metadata__":{"format":1}}',
        b'{"__metadata__":[]}',
        b'{"a":NaN}',
        b'{"a":' + b"9" * 10_000 + b"}",
        b'{"a":1,"a":1}',
        b'{"\\ud800":{}}',
        b'{"a":' + b"[" * 2_000_000,
        b'{"a":' * 500_000,
    ],
    ids=range(14),
)
def test_a_header_that_is_no_strict_json_object_is_refused(packed: Path, text: bytes) -> None:
    write_shard(packed / SHARD, text, b"")
    refused(packed)


ENTRY_FAULTS: dict[str, dict[str, Any]] = {
    "unknown dtype": {"dtype": "Q2"},
    "dtype of another type": {"dtype": 3},
    "negative side": {"shape": [-32]},
    "side as text": {"shape": ["32"]},
    "side as boolean": {"shape": [True]},
    "side beyond 2^48": {"shape": [2**62, 2**62]},
    "too many sides": {"shape": [1] * 100_000},
    "shape as text": {"shape": "32"},
    "other length": {"shape": [31]},
    "offsets swapped": {"data_offsets": [64, 0]},
    "offsets negative": {"data_offsets": [-64, 0]},
    "offsets of three": {"data_offsets": [0, 64, 64]},
    "offsets as floats": {"data_offsets": [0.0, 64.0]},
    "offsets beyond the file": {"data_offsets": [2**40, 2**40 + 64]},
    "extra field": {"stride": 2},
}


@pytest.mark.parametrize("fault", ENTRY_FAULTS.values(), ids=ENTRY_FAULTS)
def test_an_illegal_header_entry_is_refused(packed: Path, fault: dict[str, Any]) -> None:
    edit_header(packed / SHARD, lambda header: header["model.norm.weight"].update(fault))
    message = refused(packed)
    assert SHARD in message
    assert "model.norm.weight" in message or "hole" in message


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "ä", "x" * 513, "\x1b[2J"])
def test_an_illegal_tensor_name_is_refused(packed: Path, name: str) -> None:
    edit_header(packed / SHARD, lambda header: header.update({name: header.pop("model.norm.weight")}))
    refused(packed, "tensor name")


def test_overlapping_tensors_are_refused(packed: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        twin = header["model.norm.weight"]
        header["model.twin.weight"] = twin

    edit_header(packed / SHARD, overlap)
    refused(packed, "overlaps")


def test_a_hole_between_tensors_is_refused(packed: Path) -> None:
    edit_header(packed / SHARD, lambda header: header.pop("model.norm.weight"))
    refused(packed, "hole")


def test_trailing_bytes_are_refused(packed: Path) -> None:
    with (packed / SHARD).open("ab") as file:
        file.write(b"\0")
    rehash(packed / SHARD)
    refused(packed, "accounts for")


def test_a_matrix_at_an_odd_byte_is_refused(packed: Path) -> None:
    raw = (packed / SHARD).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    write_shard(packed / SHARD, raw[8:end] + b" ", raw[end:])
    refused(packed, "odd byte")


@pytest.mark.parametrize("position", [-1, -1000, -5000])
def test_one_flipped_bit_is_found(packed: Path, position: int) -> None:
    raw = bytearray((packed / SHARD).read_bytes())
    raw[position] ^= 4
    (packed / SHARD).write_bytes(raw)
    refused(packed, "sha256", VerificationError)


@pytest.mark.parametrize("half", [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00])
def test_an_illegal_scale_is_refused(packed: Path, half: int) -> None:
    entry = PackedReader(packed).info(f"{MODULE}.weight_scale")
    raw = bytearray((packed / SHARD).read_bytes())
    raw[entry.begin + 4 : entry.begin + 6] = half.to_bytes(2, "little")
    (packed / SHARD).write_bytes(raw)
    rehash(packed / SHARD)
    refused(packed, f"{MODULE}.weight_scale holds a zero, NaN or infinite scale")
    with pytest.raises(FormatError, match="scale"):
        PackedReader(packed).encoded(MODULE)


def test_a_kept_nan_is_found(packed: Path) -> None:
    entry = PackedReader(packed).info("model.norm.weight")
    raw = bytearray((packed / SHARD).read_bytes())
    raw[entry.begin : entry.begin + 2] = b"\xc0\x7f"
    (packed / SHARD).write_bytes(raw)
    rehash(packed / SHARD)
    refused(packed, "model.norm.weight holds a NaN", VerificationError)
