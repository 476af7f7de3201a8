"""A model loads by the id of a hub, packed or ordinary; the download is replaced by a copy."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

import ernieq
from tests.pack.packed_model import pack_model, source_model


@pytest.mark.parametrize("kind", ["packed", "ordinary"])
def test_an_id_gives_the_model_that_its_files_give(
    kind: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tiny()
    if kind == "packed":
        pack_model(source_model(tmp_path / "source"), tmp_path / "packed")
        remote = tmp_path / "packed"

    def snapshot(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for path in remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(ernieq.load_model("org/name")(tokens), ernieq.load_model(remote)(tokens))
