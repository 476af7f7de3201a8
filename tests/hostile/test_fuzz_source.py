"""A source checkpoint with changes drawn at random is refused or read correctly."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import given

from ernieq.checkpoint import open_checkpoint
from ernieq.errors import CheckpointError
from ernieq.model import ModelConfig, expected_parameters
from tests.hostile.fuzzing import (
    join_shard,
    library_reads,
    read_files,
    read_or_refuse,
    split_shard,
    write_files,
)
from tests.hostile.mutations import changed, damaged, json_texts
from tests.tiny import write_tiny

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@cache
def base(sharded: bool) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        path = write_tiny(
            Path(name), layers=2, experts=2, hidden=16, intermediate=16, shards=2 if sharded else 1
        )
        return read_files(path)


def configuration() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(base(False)["config.json"])
    return raw


def open_and_read(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    audit = checkpoint.audit()
    assert sorted(audit.present + audit.unknown) == checkpoint.names()
    for name in checkpoint.names():
        assert len(checkpoint.read_bytes(name)) == checkpoint.info(name).nbytes
        assert checkpoint.read(name).shape == checkpoint.info(name).shape


def check(files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        write_files(path, files)
        if read_or_refuse(lambda: open_and_read(path), CheckpointError):
            checkpoint = open_checkpoint(path)
            for shard in checkpoint.shard_files():
                library_reads(
                    shard, {name for name in checkpoint.names() if checkpoint.info(name).file == shard}
                )


def test_the_untouched_files_are_read() -> None:
    for sharded in (False, True):
        with tempfile.TemporaryDirectory() as name:
            write_files(Path(name), base(sharded))
            open_and_read(Path(name))


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


@given(raw=changed(configuration()))
def test_fuzz_a_parsed_configuration(raw: dict[str, Any]) -> None:
    read_or_refuse(lambda: expected_parameters(ModelConfig.from_dict(raw)), CheckpointError)
