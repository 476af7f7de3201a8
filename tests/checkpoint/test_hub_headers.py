"""Headers of a checkpoint of the hub, fetched without the weights behind them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from ernieq.checkpoint import header_directory, open_checkpoint
from ernieq.checkpoint.files import MANIFEST_FILE
from ernieq.errors import CheckpointError, UsageError
from ernieq.pack.layout import MANIFEST_NAME

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class RemoteFile(io.BytesIO):
    """A file of the hub that counts what is read of it."""

    def __init__(self, content: bytes, counts: list[int]) -> None:
        super().__init__(content)
        self.size = len(content)
        self._counts = counts

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self._counts.append(len(content))
        return content


@pytest.fixture
def remote(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[int]]:
    """A repository, org/name, and the lengths of what was read of its large files."""
    directory = tiny(shards=2)
    counts: list[int] = []

    class FileSystem:
        def open(self, path: str, mode: str, *, cache_type: str) -> RemoteFile:
            assert (mode, cache_type) == ("rb", "none")
            prefix = f"org/name@{COMMIT}/"
            assert path.startswith(prefix)
            return RemoteFile((directory / path.removeprefix(prefix)).read_bytes(), counts)

    def snapshot(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        small = tmp_path / "snapshots" / COMMIT
        shutil.rmtree(small, ignore_errors=True)
        shutil.copytree(directory, small, ignore=shutil.ignore_patterns("*.safetensors"))
        return str(small)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return directory, counts


def test_headers_read_as_those_of_the_whole_checkpoint(remote: tuple[Path, list[int]]) -> None:
    directory, counts = remote
    with header_directory("org/name") as headers:
        found, whole = open_checkpoint(headers), open_checkpoint(directory)
        assert found.names() == whole.names()
        for name in whole.names():
            assert found.info(name).shape == whole.info(name).shape
        assert found.audit() == whole.audit()
        assert sum(counts) < sum(path.stat().st_size for path in whole.shard_files()) / 2
    assert not headers.exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "org/name on the hub holds no model-00002-of-00002.safetensors"),
        (lambda path: path.write_bytes(b"\xff" * 7 + b"\x00" + b"{}"), "truncated or no safetensors file"),
        (lambda path: path.write_bytes(b"\x10"), "truncated or no safetensors file"),
    ],
)
def test_a_shard_that_is_none_is_named(
    remote: tuple[Path, list[int]], damage: Callable[[Path], Any], words: str
) -> None:
    damage(remote[0] / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=words), header_directory("org/name"):
        pass


def test_a_local_directory_is_itself(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny()
    with header_directory(directory) as headers:
        assert headers == directory
    assert directory.exists()
    with pytest.raises(UsageError, match="is of no use"), header_directory(directory, "main"):
        pass
    with pytest.raises(CheckpointError, match="does not exist"), header_directory(tmp_path / "nowhere"):
        pass


def test_the_manifest_has_one_name() -> None:
    assert MANIFEST_FILE == MANIFEST_NAME
