"""Golden vectors: exact bytes and the integers they decode to. They pin FORMAT.md.

A golden file changes only together with ``FORMAT_VERSION``: add ``packed-<version>/`` and its digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernieq.pack import FORMAT_VERSION, PackedReader, PackedWriter, verify_packed
from ernieq.trellis import tile_values, tiles_to_matrix
from tests.golden import format_oracle

GOLDEN_DIGESTS = {
    "0.1": "c03fc74832e5d91e6edac84fe98bb9903ba6097450f3d69c908d3f1c50aac891",
}
HERE = Path(__file__).parent
GOLDEN = HERE / f"packed-{FORMAT_VERSION}"
MODULE_NAMES = [module.name for module in format_oracle.MODULES]


def directory_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    return parsed


@pytest.mark.parametrize("version", GOLDEN_DIGESTS)
def test_a_golden_file_never_changes_within_a_format_version(version: str) -> None:
    """If this fails you changed golden files: bump FORMAT_VERSION and add a new directory instead."""
    assert directory_digest(HERE / f"packed-{version}") == GOLDEN_DIGESTS[version]


def test_the_current_format_version_has_golden_files() -> None:
    assert FORMAT_VERSION in GOLDEN_DIGESTS


def test_the_oracle_still_makes_the_golden_files() -> None:
    assert format_oracle.golden_files() == {path.name: path.read_bytes() for path in GOLDEN.iterdir()}


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_the_reader_decodes_the_golden_integers(name: str, expected: dict[str, Any]) -> None:
    matrix = PackedReader(GOLDEN).encoded(name)
    values = tiles_to_matrix(tile_values(matrix.packed, matrix.code))
    np.testing.assert_array_equal(values, expected[name]["values"])


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_signs_and_rotation_turn_the_golden_row_back(name: str, expected: dict[str, Any]) -> None:
    matrix = PackedReader(GOLDEN).encoded(name)
    hadamard = np.ones((1, 1), dtype=np.int64)
    while len(hadamard) < matrix.rotation_block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    row = np.asarray(expected[name]["values"][0]).reshape(-1, matrix.rotation_block)
    unrotated = (row @ hadamard).reshape(-1) * matrix.signs
    np.testing.assert_array_equal(unrotated, expected[name]["first_row_unrotated"])


def test_the_golden_modules_cover_every_bit_rate() -> None:
    reader = PackedReader(GOLDEN)
    assert {reader.code_of(name).bits_per_weight for name in reader.modules()} == {2, 3, 4, 5, 6}


def test_the_golden_checkpoint_verifies() -> None:
    report = verify_packed(GOLDEN)
    assert (report.quantized, report.kept, report.carried, report.files) == (6, 1, 1, 1)


def test_the_writer_makes_the_golden_bytes(tmp_path: Path) -> None:
    reader = PackedReader(GOLDEN)
    target = tmp_path / "again"
    with PackedWriter(target) as writer:
        for name in MODULE_NAMES:
            writer.add_encoded(name, reader.encoded(name))
        writer.add_tensor("model.norm.weight", reader.tensor("model.norm.weight"))
        writer.add_tensor("model.mtp.odd", reader.tensor("model.mtp.odd"), carried=True)
        writer.copy_file(GOLDEN / "tokenizer.json")
        writer.finish({"model_type": "ernie4_5"}, replace(reader.manifest, shards={}, files={}, coverage=None))
    assert (target / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    again, golden = PackedReader(target), PackedReader(GOLDEN)
    assert {name: again.spec_of(name) for name in again.modules()} == {
        name: golden.spec_of(name) for name in golden.modules()
    }
    assert (again.manifest.shards, again.manifest.files) == (golden.manifest.shards, golden.manifest.files)
