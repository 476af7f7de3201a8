"""Golden vectors: exact bytes and the integers they decode to. They pin FORMAT.md.

A golden file changes only together with ``FORMAT_VERSION``: add ``packed-<version>/`` and its digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernieq.pack import FORMAT_VERSION, PackedReader, PackedWriter, verify_packed
from ernieq.trellis import RATES, tile_values, tiles_to_matrix
from tests.golden import format_oracle

GOLDEN_DIGESTS = {
    "0.1": "c03fc74832e5d91e6edac84fe98bb9903ba6097450f3d69c908d3f1c50aac891",
    "0.2": "eed50403352c43b6fc89b373f8907e3ba9680835b8f735ed044033d8d701aade",
}
HERE = Path(__file__).parent
MODULES = [(version, module.name) for version, modules in format_oracle.MODULES.items() for module in modules]


def golden(version: str) -> Path:
    return HERE / f"packed-{version}"


def directory_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@cache
def expected(version: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((golden(version) / "expected.json").read_text())
    return parsed


@pytest.mark.parametrize("version", GOLDEN_DIGESTS)
def test_a_golden_file_never_changes_within_a_format_version(version: str) -> None:
    """If this fails you changed golden files: bump FORMAT_VERSION and add a new directory instead."""
    assert directory_digest(golden(version)) == GOLDEN_DIGESTS[version]


def test_the_current_format_version_has_golden_files() -> None:
    assert FORMAT_VERSION in GOLDEN_DIGESTS


@pytest.mark.parametrize("version", GOLDEN_DIGESTS)
def test_the_oracle_still_makes_the_golden_files(version: str) -> None:
    stored = {path.name: path.read_bytes() for path in golden(version).iterdir()}
    assert format_oracle.golden_files(version) == stored


@pytest.mark.parametrize(("version", "name"), MODULES)
def test_the_reader_decodes_the_golden_integers(version: str, name: str) -> None:
    matrix = PackedReader(golden(version)).encoded(name)
    values = tiles_to_matrix(tile_values(matrix.packed, matrix.code))
    np.testing.assert_array_equal(values, expected(version)[name]["values"])


@pytest.mark.parametrize(("version", "name"), MODULES)
def test_signs_and_rotation_turn_the_golden_row_back(version: str, name: str) -> None:
    matrix = PackedReader(golden(version)).encoded(name)
    hadamard = np.ones((1, 1), dtype=np.int64)
    while len(hadamard) < matrix.rotation_block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    row = np.asarray(expected(version)[name]["values"][0]).reshape(-1, matrix.rotation_block)
    unrotated = (row @ hadamard).reshape(-1) * matrix.signs
    np.testing.assert_array_equal(unrotated, expected(version)[name]["first_row_unrotated"])


def test_the_golden_modules_cover_every_bit_rate() -> None:
    readers = [PackedReader(golden(version)) for version in GOLDEN_DIGESTS]
    assert {reader.code_of(name).bits_per_weight for reader in readers for name in reader.modules()} == {*RATES}


@pytest.mark.parametrize(("version", "quantized"), [("0.1", 6), ("0.2", 9)])
def test_a_golden_checkpoint_verifies(version: str, quantized: int) -> None:
    report = verify_packed(golden(version))
    assert report.format_version == version
    assert (report.quantized, report.kept, report.carried, report.files) == (quantized, 1, 1, 1)


@pytest.mark.parametrize("version", GOLDEN_DIGESTS)
def test_the_writer_makes_the_golden_bytes(version: str, tmp_path: Path) -> None:
    reader = PackedReader(golden(version))
    target = tmp_path / "again"
    with PackedWriter(target) as writer:
        for name in (module.name for module in format_oracle.MODULES[version]):
            writer.add_encoded(name, reader.encoded(name))
        writer.add_tensor("model.norm.weight", reader.tensor("model.norm.weight"))
        writer.add_tensor("model.mtp.odd", reader.tensor("model.mtp.odd"), carried=True)
        writer.copy_file(golden(version) / "tokenizer.json")
        writer.finish({"model_type": "ernie4_5"}, replace(reader.manifest, shards={}, files={}, coverage=None))
    shard = (golden(version) / "model.safetensors").read_bytes()
    assert (target / "model.safetensors").read_bytes() == shard
    again = PackedReader(target)
    assert again.format_version == FORMAT_VERSION  # a writer writes the current one, whatever was read
    assert {name: again.spec_of(name) for name in again.modules()} == {
        name: reader.spec_of(name) for name in reader.modules()
    }
    assert (again.manifest.shards, again.manifest.files) == (reader.manifest.shards, reader.manifest.files)
    if version == FORMAT_VERSION:
        found, stored = (json.loads((at / "config.json").read_text()) for at in (target, golden(version)))
        assert found == stored
