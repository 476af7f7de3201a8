"""Settings of all tests: the same examples on every run, and no deadline on a busy machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("ernieq", derandomize=True, deadline=None, database=None)
settings.load_profile("ernieq")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes small random checkpoints: ``tiny(moe=False, shards=3)`` gives a directory, a new one each time."""
    from tests.tiny import write_tiny  # torch stays out of the tests that do without it

    count = 0

    def write(**options: Any) -> Path:
        nonlocal count
        count += 1
        return write_tiny(tmp_path / f"tiny-{count}", **options)

    return write


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    """Put torch's number of threads back behind a test that sets it."""
    import torch  # it stays out of the tests that do without it

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
