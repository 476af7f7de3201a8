"""Hub ids, with the download replaced: nothing here touches the network."""

from __future__ import annotations

import errno
import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ernieq.checkpoint import open_checkpoint
from ernieq.errors import CheckpointError, StorageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Copies what the patterns ask for from a directory into a snapshot, and remembers the calls."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote = remote
        self.snapshot = cache / "snapshots" / COMMIT
        self.calls: list[tuple[str, str | None]] = []

    def __call__(self, source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((source, revision))
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.snapshot)
        return str(self.snapshot)


def fake_hub(monkeypatch: pytest.MonkeyPatch, remote: Path, cache: Path) -> FakeHub:
    hub = FakeHub(remote, cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hub_id_fetches_only_what_is_needed(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    remote = tiny(shards=shards)
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "modeling_ernie4_5.py"):
        (remote / name).write_text("not wanted")
    hub = fake_hub(monkeypatch, remote, tmp_path)
    steps: list[tuple[str, int, int]] = []
    checkpoint = open_checkpoint(
        "baidu/ERNIE-tiny",
        revision="main",
        on_progress=lambda label, done, total: steps.append((label, done, total)),
    )
    checkpoint.audit()
    weights = ["model.safetensors"]
    if shards == 2:
        weights = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)] + [
            "model.safetensors.index.json"
        ]
    small = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in hub.snapshot.iterdir()) == sorted(small + weights)
    assert hub.calls == [
        ("baidu/ERNIE-tiny", "main"),
        ("baidu/ERNIE-tiny", COMMIT),
    ]  # the second step is pinned
    assert (checkpoint.source, checkpoint.revision) == ("baidu/ERNIE-tiny", COMMIT)
    assert checkpoint.directory == hub.snapshot
    assert steps == [("downloading baidu/ERNIE-tiny", step, 2) for step in range(3)]


def test_a_local_directory_goes_before_the_hub(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = fake_hub(monkeypatch, tmp_path, tmp_path)
    shutil.move(tiny(), tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").revision is None
    assert hub.calls == []


@pytest.mark.parametrize(
    "source", ["./org/name", "/org/name", "../name", "name", "a/b/c", "org/../name", "~/name"]
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = fake_hub(monkeypatch, tmp_path, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; a directory or a hub id"):
        open_checkpoint(source)
    assert hub.calls == []


def refused(kind: type[Exception]) -> Exception:
    """An error of the hub's client, which wants the answer of a server."""
    if issubclass(kind, HfHubHTTPError):
        answer: Any = SimpleNamespace(headers={}, request=None)
        return kind("403 Client Error\nmore", response=answer)
    return kind("no answer\nTry again")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, "is gated: ask for access on https://huggingface.co/baidu/nothing, then log in"),
        (
            RepositoryNotFoundError,
            "check the id; if it is private, log in with `hf auth login` or set HF_TOKEN",
        ),
        (RevisionNotFoundError, "has no revision 'v9'; name a branch, a tag or a commit"),
        (
            LocalEntryNotFoundError,
            "the hub can't be reached; connect to the network, or name a local directory",
        ),
        (OfflineModeIsEnabled, "the hub is switched off; unset HF_HUB_OFFLINE"),
        (HFValidationError, "can't be fetched from the hub: no answer"),
        (ConnectionError, "can't be fetched from the hub: no answer"),
        (RuntimeError, "can't be fetched from the hub: no answer"),
    ],
)
def test_a_failed_download_is_one_sentence_that_says_what_to_do(
    kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise refused(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("baidu/nothing", revision="v9")
    sentence = str(caught.value)
    assert sentence.startswith("baidu/nothing ")
    assert words in sentence
    assert "\n" not in sentence


def test_a_full_disk_during_a_download_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(StorageError, match="baidu/big can't be stored in the hub's cache: No space left"):
        open_checkpoint("baidu/big")


def test_a_repository_without_weights_is_described(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tiny()
    (remote / "model.safetensors").unlink()
    fake_hub(monkeypatch, remote, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weights: model\.safetensors or "):
        open_checkpoint("baidu/ERNIE-tiny")
