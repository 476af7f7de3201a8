"""Fixtures of tests that interrupt a conversion."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.convert.interrupted import Job, contents

Tiny = Callable[..., Path]


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "out").mkdir()
    return Job(tiny(tied=False), tmp_path / "out" / "packed", monkeypatch)


@pytest.fixture
def uninterrupted(job: Job) -> Callable[[], dict[str, Any]]:
    """Runs the conversion in one go, takes what it wrote and removes it."""

    def convert_whole() -> dict[str, Any]:
        job.run()
        found = contents(job.out)
        shutil.rmtree(job.out)
        return found

    return convert_whole
