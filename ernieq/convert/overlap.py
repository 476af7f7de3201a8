"""Reading and writing beside the work: the next layer comes in and encoded units go out meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch

from ernieq.checkpoint import Checkpoint, load_layer
from ernieq.model import DecoderLayer

Loaded = TypeVar("Loaded")

_QUEUED_TASKS = 256  # each holds a unit of a few megabytes


class ReadAhead(Generic[Loaded]):
    """Iterator over ``load(first)``, ``load(first + 1)``, ...; while one is worked on, a thread loads the next.

    Nothing is kept: what was handed out is the caller's alone. An error of ``load`` is raised in its turn.

    Args:
        load: loads by number; never called twice at once.
        count: how many there are.
        first: number of the first that is wanted.
    """

    def __init__(self, load: Callable[[int], Loaded], count: int, first: int = 0) -> None:
        self._load = load
        self._count = count
        self._next = first
        self._coming: Future[Loaded] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Loaded:
        if self._next == self._count:
            self._thread.shutdown()
            raise StopIteration
        coming = self._coming or self._submit()
        self._coming = None
        loaded = coming.result()
        del coming
        self._next += 1
        if self._next < self._count:
            self._coming = self._submit()
        return loaded

    def close(self) -> None:
        """Wait for the load that is under way, and begin no other."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self) -> Future[Loaded]:
        return self._thread.submit(self._load, self._next)


def read_layers(checkpoint: Checkpoint, device: torch.device, first: int = 0) -> Iterator[DecoderLayer]:
    """Layers from ``first`` on, in order: float32 for a CPU; for a GPU as stored, ahead, in pinned memory.

    Between two layers nobody else may read the checkpoint.

    Raises:
        MissingTensorError, ShapeError, NonFiniteError, CheckpointError: as ``Checkpoint.parameter``.
    """
    count = checkpoint.config.num_hidden_layers
    if device.type == "cpu":
        yield from (load_layer(checkpoint, index) for index in range(first, count))
        return
    ahead = ReadAhead(lambda index: _pinned(load_layer(checkpoint, index, None)), count, first)
    try:
        yield from ahead
    finally:
        ahead.close()


def _pinned(layer: DecoderLayer) -> DecoderLayer:
    """In memory that a GPU fetches from at full speed, as far as the system grants it."""
    for parameter in layer.parameters():
        try:
            parameter.data = parameter.data.pin_memory()
        except RuntimeError:
            return layer
    return layer


class BackgroundQueue:
    """Context manager that does tasks in a thread, one after the other, in the order in which they came.

    Leaving it waits until all are done, also if an exception is on its way: finished work is not lost. After a
    task has failed those behind it are dropped, and its exception is raised by the next call, or when the
    context is left.

    Args:
        capacity: tasks that may wait; submitting more blocks.
    """

    def __init__(self, capacity: int = _QUEUED_TASKS) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="ernieq-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task.

        Raises:
            Exception: whatever an earlier one raised.
        """
        self._raise()
        self._queue.put(task)

    def wait(self) -> None:
        """Wait until all tasks are done; raises as ``submit``."""
        self._queue.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                if self._error is None:
                    task()
            except BaseException as error:
                self._error = error
            finally:
                del task
                self._queue.task_done()
