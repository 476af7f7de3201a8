"""Configurations and manifests that are broken or made to do harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.errors import FormatError, VerificationError
from ernieq.pack import is_packed, verify_packed
from tests.hostile.packed_damage import (
    MODULE,
    SHARD,
    edit_header,
    edit_json,
    refused,
)


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
    "bits between 6 and 7": {"bits": 6.5, "rotation_block": 32},
    "bits above": {"bits": 9, "rotation_block": 32},
    "bits a quarter": {"bits": 2.25, "rotation_block": 32},
    "bits near a half": {"bits": 2.5000001, "rotation_block": 32},
    "bits of another shape": {"bits": 4.5, "rotation_block": 32},
    "bits boolean": {"bits": True, "rotation_block": 32},
    "bits a list": {"bits": [4], "rotation_block": 32},
    "bits negative": {"bits": -2.5, "rotation_block": 32},
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


def test_bits_that_are_no_number_are_refused(packed: Path) -> None:
    for text in ("NaN", "Infinity", "1e999"):
        path = packed / "config.json"
        genuine = path.read_text()
        path.write_text(genuine.replace('"bits": 4', f'"bits": {text}'))
        assert path.read_text() != genuine
        refused(packed, r"config\.json")
        path.write_text(genuine)


def test_a_half_rate_in_a_file_of_version_0_1_is_refused(packed: Path) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: manifest.update({"format_version": "0.1"}))
    quantization(packed, lambda config: config.update({"format_version": "0.1"}))
    verify_packed(packed)
    for bits in (4.5, 1.5, 8):
        quantization(packed, lambda config, bits=bits: config["modules"][MODULE].update({"bits": bits}))  # type: ignore[misc]
        refused(packed, f"{bits} bits, which format version 0.1 does not know")


@pytest.mark.parametrize("version", ["0.3", "1.0", "", None, 0.1, {"a": 1}, "0.1 "])
def test_another_format_version_is_refused(packed: Path, version: Any) -> None:
    quantization(packed, lambda config: config.update({"format_version": version}))
    refused(packed, "format version")


@pytest.mark.parametrize(("version", "advised"), [("0.3", True), ("1.0", True), ("0.0", False), ("x", False)])
def test_a_newer_format_version_alone_is_answered_with_the_advice_to_upgrade(
    packed: Path, version: str, advised: bool
) -> None:
    quantization(packed, lambda config: config.update({"format_version": version}))
    with pytest.raises(FormatError) as caught:
        verify_packed(packed)
    assert ("pip install --upgrade ernieq" in str(caught.value)) is advised


def test_another_format_version_in_the_manifest_is_refused(packed: Path) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: manifest.update({"format_version": "0.3"}))
    refused(packed, "format version")


def test_a_manifest_of_another_version_than_the_config_is_refused(packed: Path) -> None:
    edit_json(packed / "ernieq.json", lambda manifest: manifest.update({"format_version": "0.1"}))
    refused(packed, "different format versions")


@pytest.mark.parametrize("method", ["gptq", None, 3])
def test_another_method_is_refused(packed: Path, method: Any) -> None:
    quantization(packed, lambda config: config.update({"quant_method": method}))
    refused(packed, "quant_method")
    assert not is_packed(packed)


@pytest.mark.parametrize(
    "modules",
    [
        {},
        [],
        None,
        {"m.0-999999999": {}},
        {"m.0-99999.0-99999": {}},
        {"a.1-3": {}, "a.2": {}},
        {"a b": {}},
        {"\0": {}},
        {"\x1b[2J": {}},
    ],
    ids=range(9),
)
def test_an_illegal_module_table_is_refused(packed: Path, modules: Any) -> None:
    if isinstance(modules, dict):
        modules = {name: {"bits": 2, "rotation_block": 16} for name in modules}
    quantization(packed, lambda config: config.update({"modules": modules}))
    refused(packed, r"config\.json")


def test_the_name_of_a_module_is_checked_before_it_is_printed(packed: Path) -> None:
    """Found by fuzzing: an entry that is no object was refused with its name as it stood there."""
    quantization(packed, lambda config: config.update({"modules": {"\x1b[2J": None}}))
    refused(packed, r"holds the tensor name '\\x1b\[2J'")


def test_keys_of_other_tools_in_the_config_are_ignored(packed: Path) -> None:
    quantization(packed, lambda config: config.update({"modules_to_not_convert": None}))
    edit_json(packed / "config.json", lambda config: config.update({"transformers_version": "5.20.0"}))
    verify_packed(packed)


@pytest.mark.parametrize("name", ["config.json", "ernieq.json"])
@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b'{"a":1,"a":2}', b"[" * 1_000_000, b'{"a": Infinity}'])
def test_a_json_file_that_is_no_strict_object_is_refused(packed: Path, name: str, text: bytes) -> None:
    (packed / name).write_bytes(text)
    refused(packed, name.replace(".", r"\."))


@pytest.mark.parametrize("name", ["config.json", "ernieq.json"])
def test_a_huge_json_file_is_refused_unread(packed: Path, name: str) -> None:
    with (packed / name).open("r+b") as file:
        file.truncate(2**34)
    refused(packed, "at most 16777216 are allowed")


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
    "tensors tuned a text": {"tensors": {"quantized": [], "kept": [], "carried": [], "tuned": "norm"}},
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
    edit_json(packed / "ernieq.json", lambda manifest: change(manifest["tensors"].setdefault(fate, [])))


def test_a_tensor_that_the_manifest_misses_is_found(packed: Path) -> None:
    coverage(packed, "kept", lambda names: names.remove("model.norm.weight"))
    refused(packed, "model.norm.weight is stored, but not listed", VerificationError)


@pytest.mark.parametrize("fate", ["quantized", "kept", "carried", "tuned"])
def test_a_source_tensor_that_is_not_stored_is_found(packed: Path, fate: str) -> None:
    coverage(packed, fate, lambda names: names.append("model.lost.weight"))
    refused(packed, "model.lost.weight is listed in the manifest", VerificationError)


@pytest.mark.parametrize("fate", ["carried", "tuned"])
def test_a_tensor_with_two_fates_is_found(packed: Path, fate: str) -> None:
    coverage(packed, fate, lambda names: names.append("model.norm.weight"))
    refused(packed, "model.norm.weight is listed in the manifest as both", VerificationError)


def test_a_shape_other_than_the_configuration_calls_for_is_found(packed: Path) -> None:
    with pytest.raises(VerificationError, match=r"q_proj\.weight has shape \[48, 32\]"):
        verify_packed(packed, expected_shapes={f"{MODULE}.weight": (48, 48)})
    with pytest.raises(VerificationError, match=r"model\.lm_head\.weight is missing"):
        verify_packed(packed, expected_shapes={"model.lm_head.weight": (64, 32)})
