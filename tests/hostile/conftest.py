"""Whole checkpoints, to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pack.packed_factory import write_packed


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "packed")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "sharded", shard_bytes=4000)
