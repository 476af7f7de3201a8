"""Batches shrink when memory runs out, and nothing is lost or done twice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ernieq.encode import Batches
from ernieq.errors import BackendUnavailableError


class Worker:
    """Takes batches up to a size; larger ones run out of memory, as a GPU's do."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.done: list[list[int]] = []

    def __call__(self, batch: Sequence[int]) -> None:
        if len(batch) > self._capacity:
            raise torch.OutOfMemoryError("the test's GPU is full")
        self.done.append(list(batch))


def test_batches_are_of_nearly_equal_size_and_in_order() -> None:
    worker = Worker(100)
    Batches(20, "experts").run(range(64), worker)
    assert [len(batch) for batch in worker.done] == [16, 16, 16, 16]
    assert [item for batch in worker.done for item in batch] == list(range(64))


def test_a_batch_that_does_not_fit_is_halved_for_good_and_the_user_is_told() -> None:
    worker, notices = Worker(3), list[str]()
    batches = Batches(16, "experts", notices.append)
    batches.run(range(20), worker)
    assert [item for batch in worker.done for item in batch] == list(range(20))
    assert batches.size <= 3
    assert notices[-1] == f"out of GPU memory: going on with batches of {batches.size} experts"
    before = len(notices)
    batches.run(range(20), worker)
    assert len(notices) == before


def test_a_single_thing_that_does_not_fit_is_an_error_that_names_the_ways_out() -> None:
    with pytest.raises(BackendUnavailableError, match=r"--vram .* --device cpu"):
        Batches(4, "experts").run(range(4), Worker(0))


def test_other_errors_pass_through() -> None:
    def fail(_: Sequence[int]) -> None:
        raise ValueError("no memory matter")

    with pytest.raises(ValueError, match="no memory matter"):
        Batches(4, "experts").run(range(4), fail)
