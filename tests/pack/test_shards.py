"""Shards are ordinary safetensors files whose tensors are as aligned as their lengths allow."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ernieq.errors import FormatError
from ernieq.pack import RawTensor, ShardWriter, file_sha256, read_header, read_shards

tensors = st.lists(
    st.tuples(st.sampled_from([("U8", 1), ("BF16", 2), ("F32", 4), ("I64", 8)]), st.integers(0, 40)),
    max_size=12,
)


@settings(max_examples=40)
@given(given_tensors=tensors, shard_bytes=st.integers(1, 600))
def test_any_tensors_are_aligned_found_again_and_hashed(
    given_tensors: list[tuple[tuple[str, int], int]], shard_bytes: int
) -> None:
    given_tensors = [*given_tensors, (("U8", 1), 5)]
    with tempfile.TemporaryDirectory() as name:
        directory, writer = Path(name), ShardWriter(Path(name), shard_bytes=shard_bytes)
        for number, ((dtype, width), count) in enumerate(given_tensors):
            writer.add(f"t{number}", RawTensor(dtype, (count,), bytes([number]) * (width * count)))
        hashes = writer.finish()
        assert hashes == {file: file_sha256(directory / file) for file in hashes}
        entries, file_of = read_shards(directory)
        assert set(entries) == {f"t{number}" for number in range(len(given_tensors))}
        for number in range(len(given_tensors)):
            entry = entries[f"t{number}"]
            assert entry.begin % math.gcd(entry.nbytes, 64) == 0
            stored = (directory / file_of[entry.name]).read_bytes()[entry.begin : entry.end]
            assert stored == bytes([number]) * entry.nbytes
        assert sum(len(load_file(directory / file)) for file in hashes) == len(given_tensors)
        assert not list(directory.glob("*.partial"))


def test_a_tensor_larger_than_the_limit_gets_its_own_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=10)
    for name, size in (("a", 4), ("big", 100), ("b", 4)):
        writer.add(name, RawTensor("U8", (size,), b"\0" * size))
    assert len(writer.finish()) == 3
    assert [entry.name for entry in read_header(tmp_path / "model-00002-of-00003.safetensors")] == ["big"]


def test_a_tensor_that_comes_in_pieces_is_stored_as_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add_stream("a", "U8", (6,), (b"ab", b"", b"cdef"))
    writer.finish()
    (entry,) = read_header(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes()[entry.begin : entry.end] == b"abcdef"


def test_a_tensor_that_failed_leaves_no_bytes_behind(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    with pytest.raises(FormatError, match="calls for 6"):
        writer.add_stream("a", "U8", (6,), (b"abcdefgh",))
    writer.add("b", RawTensor("U8", (2,), b"xy"))
    writer.finish()
    (entry,) = read_header(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes()[entry.begin :] == b"xy"


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="without tensors"):
        ShardWriter(tmp_path).finish()
