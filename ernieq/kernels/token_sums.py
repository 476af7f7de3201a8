"""Sums of products over tokens whose bits are those of the shapes alone, whatever the number of threads.

A library splits a long sum between its threads where the result is small (MKL with AVX-512: 256 x 256 from
about 2000 tokens on), and its last bits are then those of the number of threads. Here a thread makes a block of
the result alone, and which blocks there are depends on the shape of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

from ernieq.kernels.precision import one_thread

_BLOCK_ROWS = 128
_WIDE = 1024  # rows from which on blocks are twice as high: there are enough of them


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right``.

    Args:
        total: (rows, columns) float32, changed in place.
        left: (tokens, rows) float32.
        right: (tokens, columns) float32.
    """
    if total.device.type != "cpu":
        total.addmm_(left.T, right)
        return
    _share_out(lambda block: total[block].addmm_(left[:, block].T, right), _blocks(len(total)))


def add_gram(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``add_products`` where the result is symmetric: on a CPU half of it is worked out.

    Args:
        total: (width, width) float32, symmetric, changed in place.
        left: (tokens, width) float32, ``right`` with its rows multiplied by weights.
        right: (tokens, width) float32.
    """
    if total.device.type != "cpu":
        total.addmm_(left.T, right)
        return

    def add(block: slice) -> None:
        total[block, : block.stop].addmm_(left[:, block].T, right[:, : block.stop])
        total[: block.start, block] = total[block, : block.start].T

    _share_out(add, _blocks(len(total)))


def gram_entries(width: int, device: torch.device) -> int:
    """Entries of a (width, width) result that ``add_gram`` works out."""
    if device.type != "cpu":
        return width**2
    return sum((block.stop - block.start) * block.stop for block in _blocks(width))


def _blocks(rows: int) -> list[slice]:
    """Blocks of rows, the last ones first: in a symmetric result they are the longest."""
    height = _BLOCK_ROWS if rows < _WIDE else 2 * _BLOCK_ROWS
    return [slice(start, min(start + height, rows)) for start in reversed(range(0, rows, height))]


def _share_out(work: Callable[[slice], object], blocks: Sequence[slice]) -> None:
    """Do all blocks, in as many threads as torch may use, each of which works alone."""
    threads = torch.get_num_threads()
    with one_thread(torch.device("cpu")):
        if threads == 1 or len(blocks) == 1:
            for block in blocks:
                work(block)
        else:
            list(_pool(threads).map(work, blocks))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that each work alone. It is torch's setting for threads to come, too: the caller puts it back."""
    pool, met = ThreadPoolExecutor(threads, thread_name_prefix="ernieq-sums"), Barrier(threads)

    def work_alone(_: int) -> None:
        met.wait()  # so that no thread takes two of these
        torch.set_num_threads(1)

    list(pool.map(work_alone, range(threads)))
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
