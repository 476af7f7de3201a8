"""Work in batches that fit into a GPU's memory, and in smaller ones when they turn out not to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ernieq.errors import BackendUnavailableError

Item = TypeVar("Item")


def ignore(_: str) -> None:
    """A notice that nobody reads."""


class Batches:
    """How many things of a kind are worked on at once; halved, for good, whenever memory runs out.

    Args:
        size: to begin with, at least 1.
        unit: what they are, for the notice ("experts").
        on_notice: receives a sentence when the batches become smaller.
    """

    def __init__(self, size: int, unit: str, on_notice: Callable[[str], None] = ignore) -> None:
        self.size = max(1, size)
        self._unit = unit
        self._on_notice = on_notice

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], None]) -> None:
        """Call ``work`` with one batch after the other, in order.

        A batch that runs out of GPU memory is begun again with half of its items: ``work`` must have no effect
        before it is done, or one that a repetition replaces.

        Raises:
            BackendUnavailableError: a single item does not fit.
        """
        start = 0
        while start < len(items):
            # Batches of nearly equal size: a small last one would leave the GPU idle.
            left = len(items) - start
            count = -(-left // -(-left // self.size))
            if _fits(work, items[start : start + count]):
                start += count
            else:
                self._halve(count)

    def _halve(self, count: int) -> None:
        # Out of the except clause: the exception kept the tensors of the failed attempt alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count == 1:
            raise out_of_memory()
        self.size = count // 2
        self._on_notice(f"out of GPU memory: going on with batches of {self.size} {self._unit}")


def out_of_memory() -> BackendUnavailableError:
    """What to tell a user whose GPU is too small."""
    return BackendUnavailableError(
        "the GPU has too little memory even for the smallest batch; "
        "free some, pass another --vram if it was set low, or pass --device cpu"
    )


def _fits(work: Callable[[Sequence[Item]], None], batch: Sequence[Item]) -> bool:
    try:
        work(batch)
    except torch.OutOfMemoryError:
        return False
    return True
