"""A packed directory appears whole or not at all, and what was there before survives a failure."""

from __future__ import annotations

import errno
import io
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ernieq.errors import FormatError, OutputExistsError, StorageError, VerificationError
from ernieq.pack import AtomicDirectory, Coverage, Manifest, PackedReader, PackedWriter
from ernieq.pack import atomic as atomic_module
from tests.pack.packed_factory import NORM, manifest, random_matrix, tiny_modules, write_packed


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def write_and_fail(target: Path, *, overwrite: bool = False) -> None:
    with PackedWriter(target, overwrite=overwrite) as writer:
        writer.add_encoded("a", random_matrix(16, 16, 2))
        raise KeyError


def finish_with(target: Path, config: dict[str, Any], given_manifest: Manifest) -> None:
    """Write one quantized matrix and one norm, and finish."""
    with PackedWriter(target) as writer:
        writer.add_encoded("a", random_matrix(16, 16, 2))
        writer.add_tensor("norm", NORM)
        writer.finish(config, given_manifest)


def test_an_exception_midway_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "new" / "deep" / "packed")
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "packed") as writer:
        writer.add_encoded("a", random_matrix(16, 16, 2))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        PackedWriter(tmp_path / "packed")


def test_a_directory_that_is_no_model_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(OutputExistsError, match=r"no config\.json"):
        PackedWriter(tmp_path / "home", overwrite=True)


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="is a file"):
        PackedWriter(tmp_path / "file", overwrite=True)


def test_overwrite_replaces_all_files(tmp_path: Path) -> None:
    write_packed(tmp_path / "packed", shard_bytes=4000)
    (tmp_path / "packed" / "old.txt").write_text("old")
    write_packed(tmp_path / "packed", overwrite=True)
    assert sorted(contents(tmp_path / "packed")) == [
        "README.md",
        "config.json",
        "ernieq.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_the_old_directory_survives_a_failure_while_overwriting(tmp_path: Path) -> None:
    write_packed(tmp_path / "packed")
    before = contents(tmp_path)
    with pytest.raises(KeyError):
        write_and_fail(tmp_path / "packed", overwrite=True)
    assert contents(tmp_path) == before


def test_the_old_directory_is_put_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(tmp_path / "packed")
    before = contents(tmp_path)
    rename = Path.rename

    def failing_rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial") and Path(target).name == "packed":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(StorageError, match="Input/output error"):
        write_packed(tmp_path / "packed", overwrite=True)
    assert contents(tmp_path) == before


def test_a_directory_that_fails_its_check_is_not_published(tmp_path: Path) -> None:
    def check(path: Path) -> None:
        raise VerificationError("bad")

    with AtomicDirectory(tmp_path / "out") as directory:
        (directory.path / "config.json").write_text("{}")
        with pytest.raises(VerificationError):
            directory.commit(check)
    assert list(tmp_path.iterdir()) == []


def test_finish_verifies_what_lies_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync_tree = atomic_module._fsync_tree

    def corrupting_fsync(directory: Path) -> None:
        shard = bytearray((directory / "model.safetensors").read_bytes())
        shard[-1] ^= 1
        (directory / "model.safetensors").write_bytes(shard)
        fsync_tree(directory)

    monkeypatch.setattr(atomic_module, "_fsync_tree", corrupting_fsync)
    with pytest.raises(VerificationError, match="sha256"):
        write_packed(tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_coverage_that_names_an_unwritten_tensor_is_not_published(tmp_path: Path) -> None:
    coverage = Coverage(("a.weight", "b.weight"), ("norm",))
    with pytest.raises(VerificationError, match=r"b\.weight"):
        finish_with(tmp_path / "packed", {}, replace(manifest(), coverage=coverage))
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    """A file on a disk with room for 3,000 bytes."""

    def write(self, data: Any, /) -> int:
        if self.tell() + memoryview(data).nbytes > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("full_file", ["spool.partial", "shard-00001.partial", "ernieq.json"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_file: str
) -> None:
    write_packed(tmp_path / "packed")
    before = contents(tmp_path)
    plain_open, plain_write = Path.open, Path.write_bytes

    def limited_open(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == full_file and mode in ("wb", "w+b"):
            return FullDisk(self, mode)
        return plain_open(self, mode, *args, **kwargs)

    def limited_write(self: Path, data: bytes) -> int:
        if self.name == full_file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain_write(self, data)

    monkeypatch.setattr(Path, "open", limited_open)
    monkeypatch.setattr(Path, "write_bytes", limited_write)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_packed(tmp_path / "packed", overwrite=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_every_file_is_fsynced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file a descriptor belongs to")
    monkeypatch.setattr(os, "fsync", recording_fsync)
    write_packed(tmp_path / "packed")
    names = {Path(path).name for path in synced if ".partial" in path}
    assert names >= {"model.safetensors", "config.json", "ernieq.json", "README.md"}
    assert synced[-1] == str(tmp_path)


def test_a_symbolic_link_as_target_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "packed")
    write_packed(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert PackedReader(tmp_path / "disk" / "packed").modules() == sorted(tiny_modules())


def writing_peak(target: Path, count: int) -> int:
    """Most bytes that Python held while ``count`` matrices of 1 MB were written in shards of 3 MB."""
    matrix = random_matrix(1024, 4096, 2)
    with PackedWriter(target, shard_bytes=3_000_000) as writer:
        tracemalloc.start()
        for i in range(count):
            writer.add_encoded(f"layers.{i}", matrix)
        writer.finish({}, manifest())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    assert writing_peak(tmp_path / "large", 20) < writing_peak(tmp_path / "small", 4) + 500_000


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="without a quantized matrix"), PackedWriter(tmp_path / "p") as writer:
        writer.finish({}, manifest())


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="already quantized"):
        finish_with(tmp_path / "packed", {"quantization_config": {}}, manifest())
