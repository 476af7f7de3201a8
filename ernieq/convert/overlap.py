"""Reading and writing beside the GPU's work: the next layer comes in and encoded matrices go out meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import torch

from ernieq.checkpoint import Checkpoint, load_layer
from ernieq.model import DecoderLayer
from ernieq.trellis import EncodedMatrix

Loaded = TypeVar("Loaded")

_QUEUED_MATRICES = 256  # of a few megabytes each


class Sink(Protocol):
    """Where encoded matrices go: the writer of the packed checkpoint, or a test's dictionary."""

    def add_encoded(self, module_name: str, matrix: EncodedMatrix) -> None:
        """Take one encoded matrix."""
        ...


class ReadAhead(Generic[Loaded]):
    """Iterator over ``load(0)``, ``load(1)``, ...; while one is worked on, a thread loads the next.

    Nothing is kept: what was handed out is the caller's alone. An error of ``load`` is raised in its turn.

    Args:
        load: loads by number; never called twice at once.
        count: how many there are.
    """

    def __init__(self, load: Callable[[int], Loaded], count: int) -> None:
        self._load = load
        self._count = count
        self._next = 0
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


def read_layers(checkpoint: Checkpoint, device: torch.device) -> Iterator[DecoderLayer]:
    """All layers of a checkpoint in order: float32 for a CPU; for a GPU as stored, ahead, in pinned memory.

    Between two layers nobody else may read the checkpoint.

    Raises:
        MissingTensorError, ShapeError, NonFiniteError, CheckpointError: as ``Checkpoint.parameter``.
    """
    count = checkpoint.config.num_hidden_layers
    if device.type == "cpu":
        yield from (load_layer(checkpoint, index) for index in range(count))
        return
    ahead = ReadAhead(lambda index: _pinned(load_layer(checkpoint, index, None)), count)
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


class BackgroundSink:
    """Context manager that hands matrices to a sink in a thread, in the order in which they were added.

    Leaving it waits until all are there, unless an exception is on its way. An exception of the sink is raised
    by the next call, or when the context is left; what comes after it is dropped.

    Args:
        sink: the real one; used by the thread alone until the context is left.
        capacity: matrices that may wait; adding more blocks.
    """

    def __init__(self, sink: Sink, capacity: int = _QUEUED_MATRICES) -> None:
        self._sink = sink
        self._queue: queue.Queue[tuple[str, EncodedMatrix] | None] = queue.Queue(capacity)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._write, name="ernieq-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dropping = kind is not None
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def add_encoded(self, module_name: str, matrix: EncodedMatrix) -> None:
        """Queue one encoded matrix.

        Raises:
            Exception: whatever the sink raised for an earlier one.
        """
        self._raise()
        self._queue.put((module_name, matrix))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None or self._dropping:
                continue
            try:
                self._sink.add_encoded(*item)
            except BaseException as error:
                self._error = error
