"""A packed checkpoint with changes drawn at random is refused or read correctly."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ernieq.errors import FormatError
from ernieq.pack import PackedReader, read_header, verify_packed
from ernieq.pack.patterns import MAX_NAMES, expand_names
from tests.hostile.fuzzing import (
    join_shard,
    library_reads,
    read_files,
    read_or_refuse,
    split_shard,
    write_files,
)
from tests.hostile.mutations import damaged, json_texts
from tests.pack.packed_factory import random_matrix, write_packed

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@cache
def base(sharded: bool) -> dict[str, bytes]:
    modules = {
        "model.embed_tokens": random_matrix(16, 32, 2.5, state_bits=12),
        "model.layers.0.mlp.experts.0.up_proj": random_matrix(32, 16, 2),
        "model.layers.0.mlp.experts.1.up_proj": random_matrix(32, 16, 2),
    }
    with tempfile.TemporaryDirectory() as name:
        path = write_packed(Path(name) / "packed", modules, shard_bytes=600 if sharded else 1_000_000)
        return read_files(path)


@contextmanager
def checkpoint(files: Mapping[str, bytes], *, rehash: bool = True) -> Iterator[Path]:
    """The files in a directory; the manifest's hashes made true, so that more than a wrong hash is found."""
    files = dict(files)
    if rehash:
        manifest = json.loads(files["ernieq.json"])
        for name in manifest["shards"]:
            manifest["shards"][name] = hashlib.sha256(files[name]).hexdigest()
        files["ernieq.json"] = json.dumps(manifest).encode()
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name), files)
        yield Path(name)


def verify_and_read(path: Path) -> None:
    report = verify_packed(path)
    reader = PackedReader(path)
    assert len(reader.modules()) == report.quantized > 0
    for module in reader.modules():
        matrix = reader.encoded(module)
        assert (matrix.out_features, matrix.in_features) == reader.shape_of(module)
        assert matrix.rotated_weight().shape == reader.shape_of(module)
    for name in reader.tensors():
        assert len(reader.tensor(name).data) == reader.info(name).nbytes


def check(files: Mapping[str, bytes], *, rehash: bool = True) -> None:
    with checkpoint(files, rehash=rehash) as path:
        if read_or_refuse(lambda: verify_and_read(path), FormatError):
            for shard in PackedReader(path).shard_files():
                library_reads(path / shard, {entry.name for entry in read_header(path / shard)})


def test_the_untouched_files_are_read() -> None:
    for sharded in (False, True):
        with checkpoint(base(sharded)) as path:
            verify_and_read(path)


@given(text=json_texts(split_shard(base(False)[SHARD])[0]))
def test_fuzz_a_header(text: bytes) -> None:
    check({**base(False), SHARD: join_shard(text, split_shard(base(False)[SHARD])[1])})


@given(raw=damaged(base(False)[SHARD]))
def test_fuzz_the_bytes_of_a_shard(raw: bytes) -> None:
    check({**base(False), SHARD: raw})


@given(text=json_texts(base(True)[INDEX]))
def test_fuzz_an_index(text: bytes) -> None:
    check({**base(True), INDEX: text})


@given(text=json_texts(base(False)["config.json"]))
def test_fuzz_a_configuration(text: bytes) -> None:
    check({**base(False), "config.json": text})


@given(text=json_texts(base(False)["ernieq.json"]))
def test_fuzz_a_manifest(text: bytes) -> None:
    check({**base(False), "ernieq.json": text}, rehash=False)


NAME_PARTS = ["0-3", "7", "x", "", "0,2", "00", "1-", "5-999999", "0-4095", "a-1"]
names = st.lists(st.sampled_from(NAME_PARTS), max_size=5).map(".".join) | st.text("0123456789-,.x", max_size=24)


@given(patterns=st.lists(names, max_size=3))
def test_fuzz_name_patterns(patterns: list[str]) -> None:
    def expand() -> None:
        names = expand_names(patterns, "a file")
        assert len(names) == len(set(names)) <= MAX_NAMES

    read_or_refuse(expand, FormatError)
