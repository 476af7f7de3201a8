"""Measures speed: tokens per second for prompts and for steps, and the bandwidth that bounds the latter.

An engine is what runs the model: the runtime on a GPU, the model's forward pass anywhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ernieq.model import ErnieForCausalLM, KVCache
from ernieq.runtime.runtime import PackedRuntime

_WARM_UP_STEPS = 3
_COPIED_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_COPIES = 5


class Engine(Protocol):
    """Sequences that can be begun and continued."""

    device: torch.device
    cache_bytes: int

    def prefill(self, token_ids: Tensor, /) -> None:
        """Begin with a prompt: (batch, T) int64."""

    def steps(self, count: int, /) -> None:
        """Add the most likely token to each sequence, some times."""

    def forget(self, tokens: int, /) -> None:
        """Keep only the first tokens of each sequence."""


class RuntimeEngine:
    """The packed runtime; ``cache_bytes`` are those of a number in its cache."""

    cache_bytes = 2

    def __init__(self, model: ErnieForCausalLM, max_tokens: int, batch: int) -> None:
        self._runtime = PackedRuntime(model, max_tokens=max_tokens, batch=batch)
        self.device = self._runtime.context.device

    def prefill(self, token_ids: Tensor) -> None:
        """Begin with a prompt."""
        self._runtime.prefill(token_ids)
        self._runtime.start_sampling()

    def steps(self, count: int) -> None:
        """Add tokens; they are chosen where they are computed."""
        for _ in range(count):
            self._runtime.step_sample()

    def forget(self, tokens: int) -> None:
        """Keep only the first tokens."""
        self._runtime.seek(tokens)


class ForwardEngine:
    """The model's own forward pass."""

    def __init__(self, model: ErnieForCausalLM, max_tokens: int, batch: int) -> None:
        parameter = next(model.parameters())
        self.device = parameter.device
        self.cache_bytes = parameter.dtype.itemsize
        self._model = model
        self._cache = KVCache(model.config, batch, max_tokens, parameter.dtype, parameter.device)
        self._next = torch.empty(batch, 1, dtype=torch.int64, device=parameter.device)

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor) -> None:
        """Begin with a prompt."""
        self._cache.length = 0
        for part in token_ids.to(self.device).split(512, dim=1):
            self._run(part)

    @torch.inference_mode()
    def steps(self, count: int) -> None:
        """Add tokens."""
        for _ in range(count):
            self._run(self._next)

    def forget(self, tokens: int) -> None:
        """Keep only the first tokens."""
        self._cache.length = tokens

    def _run(self, token_ids: Tensor) -> None:
        logits: Tensor = self._model(token_ids, self._cache, last_only=True)
        self._next = logits[:, -1].argmax(-1, keepdim=True)


@dataclass(frozen=True)
class Speed:
    """What was measured for one prompt length.

    Attributes:
        prompt: tokens of each prompt.
        prefill_seconds: for all prompts of the batch.
        step_seconds: for one token of every sequence, behind the prompt.
        context: tokens that a sequence had on average during the steps.
    """

    prompt: int
    prefill_seconds: float
    step_seconds: float
    context: int


def new_engine(model: ErnieForCausalLM, *, max_tokens: int, batch: int) -> Engine:
    """The runtime if it can take the model, else the forward pass."""
    kind = ForwardEngine if PackedRuntime.supports(model) else RuntimeEngine
    return kind(model, max_tokens, batch)


def measure_speed(engine: Engine, token_ids: Tensor, steps: int, *, repeats: int = 3) -> Speed:
    """Time a prompt and the steps behind it.

    Args:
        engine: with room for both.
        token_ids: (batch, T) int64, the prompt.
        steps: tokens to add for each sequence.
        repeats: prompts that are timed; their median counts. The first of all is run once more to warm up.
    """
    prompt = token_ids.shape[1]
    engine.prefill(token_ids)
    warm_up = min(_WARM_UP_STEPS, steps)
    engine.steps(warm_up)
    engine.forget(prompt)
    prefill = statistics.median(
        seconds(lambda: engine.prefill(token_ids), engine.device) for _ in range(repeats)
    )
    step = seconds(lambda: engine.steps(steps), engine.device) / steps
    return Speed(prompt, prefill, step, prompt + steps // 2)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of some large copies within a device."""
    size = _COPIED_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.zeros_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device) for _ in range(_COPIES))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call and of all that it left to the GPU."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
