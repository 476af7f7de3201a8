"""PackedRuntime: prompt in, logits or tokens out, everything on one GPU."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from ernieq.errors import BackendUnavailableError, NonFiniteError, ShapeError, UsageError
from ernieq.kernels.device import require_memory
from ernieq.model import ErnieForCausalLM
from ernieq.runtime.cache import Context, context_bytes
from ernieq.runtime.gather import gather, why_not
from ernieq.runtime.graph import Replay
from ernieq.runtime.plan import ModelPlan
from ernieq.runtime.prefill import Prefill
from ernieq.runtime.sampling import GROUP_LIMIT, DeviceSampler
from ernieq.runtime.step import TokenStep

MAX_BATCH = 8  # what the kernels of a token step are made for


class PackedRuntime:
    """Runs up to eight sequences of one length; see the package for how.

    The tensors that ``prefill`` and ``step`` return are one buffer, which the next call overwrites.

    Args:
        model: a packed model on a GPU; its modules stay usable and share their weights with the runtime.
        max_tokens: tokens that a sequence can have, prompt and completion together.
        batch: number of sequences.
        graph: False launches the kernels of a step one by one.

    Raises:
        BackendUnavailableError: the model can't be run so (``supports`` says why), or the GPU has too little
            memory for the context.
        UsageError: ``batch`` or ``max_tokens`` is out of range.
    """

    def __init__(
        self, model: ErnieForCausalLM | ModelPlan, *, max_tokens: int, batch: int = 1, graph: bool = True
    ) -> None:
        if not 1 <= batch <= MAX_BATCH:
            raise UsageError(f"the runtime was asked for {batch} sequences; allowed are 1 to {MAX_BATCH}")
        if max_tokens < 1:
            raise UsageError(
                f"the runtime was asked for a context of {max_tokens} tokens; it must be at least 1"
            )
        if isinstance(model, ErnieForCausalLM) and (reason := why_not(model)):
            raise BackendUnavailableError(f"the runtime can't take this model: {reason}")
        with torch.inference_mode():
            self.plan = gather(model) if isinstance(model, ErnieForCausalLM) else model
            device = self.plan.norm.device
            needed = context_bytes(self.plan.config, max_tokens=max_tokens, batch=batch)
            require_memory(device, needed, f"a context of {batch} x {max_tokens} tokens")
            self.context = Context(self.plan.config, max_tokens=max_tokens, batch=batch, device=device)
            self._step = TokenStep(self.plan, self.context)
            self._prefill = Prefill(self.plan, self.context)
            self._sampler = DeviceSampler(batch, device)
        state = [self._step.tokens, self._step.logits, self.context.position]
        sampling = [*state, *self._sampler.state]
        captured = graph and device.type == "cuda"
        self._replay = Replay(self._step.run, state, captured=captured)
        own = weakref.proxy(self)  # a cycle would hold the GPU's memory until the next garbage collection
        self._replay_greedy = Replay(lambda: own._choose_and_step(), sampling, captured=captured)
        self._replay_drawn = Replay(
            lambda: own._draw_and_step(), sampling, captured=captured, generators=[self._sampler.generator]
        )
        self._sampling = self._replay_greedy

    @classmethod
    def supports(cls, model: ErnieForCausalLM) -> str:
        """Why a model can't be run, as the end of a sentence; empty if it can."""
        return why_not(model)

    @property
    def length(self) -> int:
        """Tokens that each sequence has in the context."""
        return self.context.length

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor, *, past: int = 0) -> Tensor:
        """Begin sequences with a prompt.

        Args:
            token_ids: (batch, T) int64 on any device, T at least 1.
            past: tokens of the context to keep before it.

        Returns:
            (batch, V) float32, logits after the last token.

        Raises:
            ShapeError: the prompt is not (batch, T).
            UsageError: it does not fit, or has a token outside the vocabulary.
        """
        if token_ids.ndim != 2 or token_ids.shape[0] != self.context.batch or not token_ids.shape[1]:
            raise ShapeError(
                f"the prompt has shape {tuple(token_ids.shape)}; expected ({self.context.batch}, at least 1)"
            )
        smallest, largest = int(token_ids.min()), int(token_ids.max())
        if smallest < 0 or largest >= self.plan.config.vocab_size:
            raise UsageError(
                f"token ids span {smallest} to {largest}; allowed are 0 to {self.plan.config.vocab_size - 1}"
            )
        self.seek(past)
        self.context.require(token_ids.shape[1])
        hidden = self._prefill.run(token_ids.to(self.context.device))
        self._step.finish(hidden)
        self.context.seek(past + token_ids.shape[1])
        return self._step.logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Add one token to every sequence.

        Args:
            tokens: (batch,) int64, in the vocabulary, best on the GPU: nothing waits then.

        Returns:
            (batch, V) float32, logits after it.

        Raises:
            UsageError: the context is full.
        """
        self.context.require(1)
        self._step.tokens.copy_(tokens, non_blocking=True)
        self._replay()
        self.context.length += 1
        return self._step.logits

    @torch.inference_mode()
    def seek(self, length: int) -> None:
        """Continue behind the first ``length`` tokens of the context, whatever they are.

        Raises:
            UsageError: the context is not that long.
        """
        if not 0 <= length <= self.context.max_tokens:
            raise UsageError(f"the context holds {self.context.max_tokens} tokens; it can't go on at {length}")
        self.context.seek(length)

    @torch.inference_mode()
    def start_sampling(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        """Say how ``step_sample`` chooses; a temperature of 0 takes the most likely token always.

        One seed gives one text on one kind of GPU; it is not the text that the CPU's sampler gives.

        Raises:
            UsageError: the context is full.
        """
        self.context.require(1)
        self._sampling = self._replay_drawn if temperature else self._replay_greedy
        self._sampling.prepare()
        self._sampler.begin(temperature, top_p, seed)

    @torch.inference_mode()
    def step_sample(self) -> Tensor:
        """Choose a token after the last logits and add it to its sequence; nothing waits for the GPU.

        Returns:
            (batch,) int64 on the GPU, the tokens, in a buffer that the next call overwrites.

        Raises:
            UsageError: the context is full.
        """
        self.context.require(1)
        self._sampling()
        self.context.length += 1
        return self._step.tokens

    def sample(self, count: int, *, group: int = 8) -> Iterator[Tensor]:
        """Tokens after the last logits, as ``start_sampling`` said.

        The GPU is at work on the next group while one is looked at, so that the context may be up to two groups
        ahead of what was yielded when the caller stops.

        Args:
            count: tokens for every sequence.
            group: tokens between two looks, at most 64; the first token comes alone.

        Yields:
            (batch, n) int64 on the CPU.

        Raises:
            UsageError: they do not fit into the context.
            NonFiniteError: logits were NaN or infinite.
        """
        self.context.require(count)
        under_way: deque[_Group] = deque()
        launched = 0
        while launched < count or under_way:
            if launched < count and len(under_way) < 2:
                size = min(group, GROUP_LIMIT, count - launched) if launched else 1
                under_way.append(self._launch(size))
                launched += size
            else:
                yield under_way.popleft().tokens()

    @torch.inference_mode()
    def _launch(self, size: int) -> _Group:
        self._sampler.begin_group()
        for _ in range(size):
            self.step_sample()
        return _Group(self._sampler.drawn[:, :size], self._sampler.finite)

    def _choose_and_step(self) -> None:
        self._sampler.choose(self._step.logits, self._step.tokens)
        self._step.run()

    def _draw_and_step(self) -> None:
        self._sampler.draw(self._step.logits, self._step.tokens)
        self._step.run()


class _Group:
    """Tokens on their way from the GPU: (batch, n) int64."""

    def __init__(self, drawn: Tensor, finite: Tensor) -> None:
        on_gpu = drawn.device.type == "cuda"
        self._drawn = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=on_gpu)
        self._finite = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=on_gpu)
        self._drawn.copy_(drawn, non_blocking=True)
        self._finite.copy_(finite, non_blocking=True)
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record()

    def tokens(self) -> Tensor:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._finite.item():
            raise NonFiniteError("the model's logits contain NaN or infinite numbers: its weights are damaged")
        return self._drawn
