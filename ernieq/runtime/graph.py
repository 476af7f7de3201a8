"""A row of kernels, captured once and replayed: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARM_UP_RUNS = 2


class Replay:
    """Runs a function on fixed buffers, from a CUDA graph once it was captured.

    Args:
        body: what to run; it must neither wait for the host nor move a buffer.
        state: tensors that a run changes and that must be found unchanged after the capture, which runs the
            body to warm up. What else a run writes, the next one must write again.
        captured: False runs the body itself each time.
        generators: random generators that the body draws from.
    """

    def __init__(
        self,
        body: Callable[[], None],
        state: Sequence[Tensor],
        *,
        captured: bool,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._body = body
        self._state = state
        self._captured = captured
        self._generators = generators
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Run once; the first call captures."""
        if not self._captured:
            self._body()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def prepare(self) -> None:
        """Capture now, if that is to be done at all and was not."""
        if self._captured and self._graph is None:
            self._graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self._state]
        # Kernels may keep memory per stream: what the warm-up makes on this one, the capture finds on it.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_RUNS):
                self._restore(before)  # a place behind the last token must not be written to
                self._body()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()  # kernels are compiled and buffers allocated before the capture begins
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):
            self._body()
        self._restore(before)
        return graph

    def _restore(self, before: Sequence[Tensor]) -> None:
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
