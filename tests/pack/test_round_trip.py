"""What the writer is given, the reader gives back, for every legal matrix and any cut into shards."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ernieq.errors import FormatError
from ernieq.pack import PackedReader, PackedWriter, RawTensor, is_packed, verify_packed
from ernieq.trellis import RATES, EncodedMatrix
from tests.pack.packed_factory import EXTRA, NORM, ROUTER, manifest, random_matrix, tiny_modules, write_packed


def assert_equal(found: EncodedMatrix, expected: EncodedMatrix) -> None:
    np.testing.assert_array_equal(found.packed, expected.packed)
    np.testing.assert_array_equal(found.scale.view(np.uint16), expected.scale.view(np.uint16))
    np.testing.assert_array_equal(found.signs, expected.signs)
    assert (found.code, found.rotation_block) == (expected.code, expected.rotation_block)
    assert [part.dtype.name for part in (found.packed, found.scale, found.signs)] == [
        "int16",
        "float16",
        "int8",
    ]


@settings(max_examples=30)
@given(
    tiles=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    bits=st.sampled_from(RATES),
    state_bits=st.sampled_from([12, 13, 14, 16]),
    block=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_any_matrix_is_read_back_as_it_was_written(
    tiles: tuple[int, int], bits: float, state_bits: int, block: int, seed: int
) -> None:
    state_bits = max(state_bits, 14 if bits == 7 else 16 if bits == 8 else 0)
    matrix = random_matrix(16 * tiles[0], 16 * tiles[1], bits, state_bits=state_bits, block=block, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        target = write_packed(Path(directory) / "packed", {"model.layers.0.mlp.up_proj": matrix})
        assert_equal(PackedReader(target).encoded("model.layers.0.mlp.up_proj"), matrix)


@settings(max_examples=15)
@given(shard_bytes=st.integers(1, 20_000))
def test_any_shard_limit_gives_the_same_tensors(shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        target = write_packed(Path(directory) / "packed", shard_bytes=shard_bytes)
        reader = PackedReader(target)
        assert reader.modules() == sorted(tiny_modules())
        for name, matrix in tiny_modules().items():
            assert_equal(reader.encoded(name), matrix)
        for name, raw in (("model.norm.weight", NORM), ("model.layers.1.mlp.gate.weight", ROUTER)):
            found = reader.tensor(name)
            assert (found.dtype, found.shape, bytes(found.data)) == (raw.dtype, raw.shape, raw.data)


def test_kept_and_carried_tensors_are_listed_apart(tmp_path: Path) -> None:
    reader = PackedReader(write_packed(tmp_path / "packed"))
    coverage = reader.manifest.coverage
    assert coverage is not None
    assert set(coverage.kept) == {"model.norm.weight", "model.layers.1.mlp.gate.weight"}
    assert coverage.carried == ("model.mtp_extra.weight",)
    assert bytes(reader.tensor("model.mtp_extra.weight").data) == EXTRA.data


def test_the_safetensors_library_reads_the_same_bytes(tmp_path: Path) -> None:
    target = write_packed(tmp_path / "packed")
    reader, stored = PackedReader(target), load_file(target / "model.safetensors")
    for name, matrix in tiny_modules().items():
        np.testing.assert_array_equal(stored[f"{name}.weight_packed"].numpy(), matrix.packed)
    assert len(stored) == 3 * len(reader.modules()) + len(reader.tensors())


def test_one_shard_needs_no_index_and_several_have_one(tmp_path: Path) -> None:
    one = write_packed(tmp_path / "one")
    several = write_packed(tmp_path / "several", shard_bytes=4000)
    assert sorted(path.name for path in one.iterdir()) == [
        "README.md", "config.json", "ernieq.json", "model.safetensors",
    ]  # fmt: skip
    shards = PackedReader(several).shard_files()
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 1
    assert (several / "model.safetensors.index.json").is_file()
    assert verify_packed(several).shards == len(shards)


def test_packed_matrices_of_whole_cache_lines_start_on_one(tmp_path: Path) -> None:
    reader = PackedReader(write_packed(tmp_path / "packed"))
    for module in reader.modules():
        entry = reader.info(f"{module}.weight_packed")
        assert entry.nbytes % 64 == 0
        assert entry.begin % 64 == 0


def test_arrays_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    reader = PackedReader(write_packed(tmp_path / "packed"))
    first, again = (reader.encoded("model.embed_tokens").packed for _ in range(2))
    assert np.shares_memory(first, again)
    assert not first.flags.writeable


def test_two_conversions_with_one_date_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = write_packed(tmp_path / "one"), write_packed(tmp_path / "two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()


def test_the_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    found = PackedReader(write_packed(tmp_path / "packed")).manifest
    assert (found.source, found.recipe, found.seed) == (manifest().source, manifest().recipe, 7)
    assert found.created.endswith("+00:00")


def test_a_plain_directory_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "ernie4_5"}')
    assert not is_packed(tmp_path)
    assert not is_packed(tmp_path / "missing")
    assert is_packed(write_packed(tmp_path / "packed"))


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_an_illegal_scale_is_refused_before_it_is_written(tmp_path: Path, scale: float) -> None:
    matrix = random_matrix(16, 16, 2)
    matrix.scale[3] = scale
    with PackedWriter(tmp_path / "packed") as writer, pytest.raises(FormatError, match=r"m\.weight_scale"):
        writer.add_encoded("m", matrix)


def test_a_name_can_be_written_once_only(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "packed") as writer:
        writer.add_tensor("x", NORM)
        with pytest.raises(FormatError, match="x is written twice"):
            writer.add_tensor("x", NORM)


def test_data_that_does_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "packed") as writer, pytest.raises(FormatError, match="calls for 8"):
        writer.add_tensor("x", RawTensor("F32", (2,), b"\0" * 7))


@pytest.mark.parametrize("name", ["config.json", "ernieq.json", "model.safetensors", "README.md"])
def test_a_copied_file_can_not_replace_one_of_the_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with PackedWriter(tmp_path / "packed") as writer, pytest.raises(FormatError, match=name):
        writer.copy_file(tmp_path / name)


def test_the_package_imports_without_torch() -> None:
    program = "import sys, ernieq.pack; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
