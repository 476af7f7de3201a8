"""Packed checkpoints that are broken or made to do harm: refused at once, by name, with little memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.errors import FormatError, VerificationError
from ernieq.pack import PackedReader, file_sha256, is_packed, verify_packed
from tests.pack.packed_factory import write_packed

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
MODULE = "model.layers.0.self_attn.q_proj"
MOST_SECONDS = 1.0
MOST_BYTES = 64_000_000


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "packed")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "sharded", shard_bytes=4000)


def refused(path: Path, match: str | None = None, kind: type[FormatError] = FormatError) -> str:
    """Verify, expect a refusal in one sentence, and bound its time and memory."""
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(kind, match=match) as caught:
        verify_packed(path)
    elapsed, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert elapsed < MOST_SECONDS
    assert peak < MOST_BYTES
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    message.encode("utf-8")
    return message


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
    edit_json(
        shard.parent / "ernieq.json",
        lambda manifest: manifest["shards"].update({shard.name: file_sha256(shard)}),
    )


# ------------------------------------------------------------------------------------------------ shard bytes


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


# ------------------------------------------------------------------------------------------- modules, config


@pytest.mark.parametrize("suffix", ["packed", "scale", "signs"])
def test_a_module_that_lacks_a_part_is_refused(packed: Path, suffix: str) -> None:
    def rename(header: dict[str, Any]) -> None:
        header["model.other"] = header.pop(f"{MODULE}.weight_{suffix}")

    edit_header(packed / SHARD, rename)
    refused(packed, f"{MODULE}.weight_{suffix} is missing")


def test_a_part_of_an_unlisted_module_is_refused(packed: Path) -> None:
    edit_header(
        packed / SHARD, lambda header: header.update({"ghost.weight_scale": header.pop("model.norm.weight")})
    )
    refused(packed, "ghost.weight_scale belongs to no module")


def test_a_matrix_stored_twice_is_refused(packed: Path) -> None:
    edit_header(
        packed / SHARD, lambda header: header.update({f"{MODULE}.weight": header.pop("model.norm.weight")})
    )
    refused(packed, f"{MODULE}.weight is stored beside its own quantized form")


def test_a_part_of_another_dtype_is_refused(packed: Path) -> None:
    edit_header(packed / SHARD, lambda header: header[f"{MODULE}.weight_packed"].update({"dtype": "BF16"}))
    refused(packed, f"{MODULE}.weight_packed is BF16")


def quantization(packed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_json(packed / "config.json", lambda config: change(config["quantization_config"]))


MODULE_FAULTS: dict[str, Any] = {
    "other bits": {"bits": 3, "rotation_block": 32},
    "bits below": {"bits": 1, "rotation_block": 32},
    "bits above": {"bits": 7, "rotation_block": 32},
    "bits as text": {"bits": "4", "rotation_block": 32},
    "bits missing": {"rotation_block": 32},
    "bits huge": {"bits": 10**30, "rotation_block": 32},
    "block no power of two": {"bits": 4, "rotation_block": 24},
    "block above 128": {"bits": 4, "rotation_block": 256},
    "block does not divide": {"bits": 4, "rotation_block": 64},
    "block zero": {"bits": 4, "rotation_block": 0},
    "block boolean": {"bits": 4, "rotation_block": True},
    "state bits": {"bits": 4, "rotation_block": 32, "state_bits": 15},
    "state too short": {"bits": 6, "rotation_block": 32, "state_bits": 10},
    "unknown key": {"bits": 4, "rotation_block": 32, "zero_points": True},
    "no object": 4,
}


@pytest.mark.parametrize("entry", MODULE_FAULTS.values(), ids=MODULE_FAULTS)
def test_an_illegal_module_entry_is_refused(packed: Path, entry: Any) -> None:
    quantization(packed, lambda config: config["modules"].update({MODULE: entry}))
    assert MODULE in refused(packed)


@pytest.mark.parametrize("version", ["0.2", "1.0", "", None, 0.1, {"a": 1}, "0.1 "])
def test_another_format_version_is_refused(packed: Path, version: Any) -> None:
    quantization(packed, lambda config: config.update({"format_version": version}))
    refused(packed, "format version")


def test_another_format_version_in_the_manifest_is_refused(packed: Path) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: manifest.update({"format_version": "0.2"}))
    refused(packed, "format version")


@pytest.mark.parametrize("method", ["gptq", None, 3])
def test_another_method_is_refused(packed: Path, method: Any) -> None:
    quantization(packed, lambda config: config.update({"quant_method": method}))
    refused(packed, "quant_method")
    assert not is_packed(packed)


@pytest.mark.parametrize(
    "modules",
    [{}, [], None, {"m.0-999999999": {}}, {"m.0-99999.0-99999": {}}, {"a.1-3": {}, "a.2": {}}, {"a b": {}}],
    ids=range(7),
)
def test_an_illegal_module_table_is_refused(packed: Path, modules: Any) -> None:
    if isinstance(modules, dict):
        modules = {name: {"bits": 2, "rotation_block": 16} for name in modules}
    quantization(packed, lambda config: config.update({"modules": modules}))
    refused(packed, r"config\.json")


def test_keys_of_other_tools_in_the_config_are_ignored(packed: Path) -> None:
    quantization(packed, lambda config: config.update({"modules_to_not_convert": None}))
    edit_json(packed / "config.json", lambda config: config.update({"transformers_version": "5.20.0"}))
    verify_packed(packed)


# ------------------------------------------------------------------------------------------------ manifest


@pytest.mark.parametrize("name", ["config.json", "ernieq.json"])
@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b'{"a":1,"a":2}', b"[" * 1_000_000, b'{"a": Infinity}'])
def test_a_json_file_that_is_no_strict_object_is_refused(packed: Path, name: str, text: bytes) -> None:
    (packed / name).write_bytes(text)
    refused(packed, name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["config.json", "ernieq.json"])
def test_a_huge_json_file_is_refused_unread(packed: Path, name: str) -> None:
    with (packed / name).open("r+b") as file:
        file.truncate(2**34)
    refused(packed, "larger than")


@pytest.mark.parametrize("name", ["config.json", "ernieq.json", SHARD])
def test_a_missing_file_is_refused(packed: Path, name: str) -> None:
    (packed / name).unlink()
    refused(packed, name)


MANIFEST_FAULTS: dict[str, dict[str, Any]] = {
    "version missing": {"ernieq_version": None},
    "source a list": {"source": []},
    "source without name": {"source": {"revision": None, "files": {}}},
    "revision a number": {"source": {"name_or_path": "x", "revision": 3, "files": {}}},
    "source hash short": {"source": {"name_or_path": "x", "revision": None, "files": {"a": "00"}}},
    "seed a boolean": {"seed": True},
    "seed a text": {"seed": "0"},
    "calibration a list": {"calibration": []},
    "calibration tokens": {"calibration": {"files": {}, "tokens": "many", "windows": 1, "seed": 0}},
    "tensors missing": {"tensors": {}},
    "tensors of numbers": {"tensors": {"quantized": [1], "kept": [], "carried": []}},
    "tensors beyond count": {"tensors": {"quantized": ["a.0-999999"], "kept": [], "carried": []}},
    "shard hash upper case": {"shards": {SHARD: "A" * 64}},
    "shards missing": {"shards": {}},
    "file hash of a path": {"files": {"../../etc/passwd": "0" * 64}},
    "file that is missing": {"files": {"tokenizer.json": "0" * 64}},
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS.values(), ids=MANIFEST_FAULTS)
def test_an_illegal_manifest_is_refused(packed: Path, fault: dict[str, Any]) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: manifest.update(fault))
    refused(packed)


def test_unknown_manifest_keys_are_ignored(packed: Path) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: manifest.update({"future": [1, 2]}))
    verify_packed(packed)


def coverage(packed: Path, fate: str, change: Callable[[list[str]], None]) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: change(manifest["tensors"][fate]))


def test_a_tensor_that_the_manifest_misses_is_found(packed: Path) -> None:
    coverage(packed, "kept", lambda names: names.remove("model.norm.weight"))
    refused(packed, "model.norm.weight is stored, but not listed", VerificationError)


@pytest.mark.parametrize("fate", ["quantized", "kept", "carried"])
def test_a_source_tensor_that_is_not_stored_is_found(packed: Path, fate: str) -> None:
    coverage(packed, fate, lambda names: names.append("model.lost.weight"))
    refused(packed, "model.lost.weight is listed in the manifest", VerificationError)


def test_a_tensor_with_two_fates_is_found(packed: Path) -> None:
    coverage(packed, "carried", lambda names: names.append("model.norm.weight"))
    refused(packed, "model.norm.weight is listed in the manifest as both", VerificationError)


def test_a_shape_other_than_the_configuration_calls_for_is_found(packed: Path) -> None:
    with pytest.raises(VerificationError, match=r"q_proj\.weight has shape \[48, 32\]"):
        verify_packed(packed, expected_shapes={f"{MODULE}.weight": (48, 48)})
    with pytest.raises(VerificationError, match=r"model\.lm_head\.weight is missing"):
        verify_packed(packed, expected_shapes={"model.lm_head.weight": (64, 32)})


# ------------------------------------------------------------------------------------------------ files, links


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
