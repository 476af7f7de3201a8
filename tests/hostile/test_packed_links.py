"""Indexes, links and files that lead elsewhere or do not belong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ernieq.errors import VerificationError
from ernieq.pack import PackedReader, verify_packed
from tests.hostile.packed_damage import (
    INDEX,
    SHARD,
    edit_json,
    refused,
)


def test_a_stray_shard_is_found(packed: Path) -> None:
    (packed / "model-extra.safetensors").write_bytes((packed / SHARD).read_bytes())
    refused(packed, r"model-extra\.safetensors lies in", VerificationError)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "model.bin",
        "",
        3,
        None,
        "model\n.safetensors",
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(sharded: Path, name: Any) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refused(sharded, INDEX)


def test_an_index_that_names_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / PackedReader(sharded).shard_files()[1]).unlink()
    refused(sharded, "model-00002-of-.* is missing")


def test_an_index_that_disagrees_with_a_header_is_refused(sharded: Path) -> None:
    def swap(index: dict[str, Any]) -> None:
        files = sorted(set(index["weight_map"].values()))
        current = index["weight_map"]["model.norm.weight"]
        index["weight_map"]["model.norm.weight"] = next(name for name in files if name != current)

    edit_json(sharded / INDEX, swap)
    refused(sharded, "model.norm.weight")


def test_an_index_that_lacks_a_stored_tensor_is_refused(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    refused(sharded, "model.norm.weight is stored in")


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: Any) -> None:
    edit_json(sharded / INDEX, lambda index: index.update({"weight_map": weight_map}))
    refused(sharded, "weight_map")


@pytest.mark.parametrize("name", ["config.json", "ernieq.json", SHARD])
def test_a_link_out_of_the_directory_is_refused(packed: Path, name: str) -> None:
    outside = packed.parent / "outside"
    (packed / name).rename(outside)
    (packed / name).symlink_to(outside)
    refused(packed, "outside the checkpoint")


def test_a_loop_of_links_is_refused(packed: Path) -> None:
    (packed / SHARD).unlink()
    (packed / SHARD).symlink_to(packed / SHARD)
    refused(packed, "missing or can't be read")


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(packed: Path) -> None:
    (packed / SHARD).unlink()
    os.mkfifo(packed / SHARD)
    refused(packed, "not a regular file")


def test_the_links_of_the_hugging_face_cache_are_followed(packed: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(packed.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert verify_packed(snapshot).quantized == 8
