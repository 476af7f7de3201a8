"""A small source with its text, and what an undisturbed conversion makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.quantizing import done, quantize
from tests.convert.conversions import write_words
from tests.e2e.resuming import SMALL, weights
from tests.tiny import write_tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_words(tmp_path / "words.txt")
    return write_tiny(tmp_path / "source", **SMALL)


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> dict[str, str]:
    done(quantize(source, tmp_path / "whole"))
    return weights(tmp_path / "whole")
