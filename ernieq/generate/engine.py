"""What turns a sequence into logits: the model's own forward pass, or the fast runtime of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ernieq.model import ErnieForCausalLM, KVCache

if TYPE_CHECKING:
    from ernieq.runtime import PackedRuntime

# A long prompt goes through the model in parts of this many tokens, which bounds what a layer holds.
_PROMPT_PART = 512


class Engine(Protocol):
    """One sequence; logits are (vocabulary,) float32 and hold until the next call."""

    def prompt(self, token_ids: Sequence[int]) -> Tensor:
        """Take the first tokens, at least one; logits after the last of them."""

    def step(self, token: Tensor) -> Tensor:
        """Take one more, (1,) int64 on the model's device; logits after it."""


def make_engine(model: ErnieForCausalLM, max_tokens: int) -> Engine:
    """The fastest engine that the model has: the runtime if it is packed and on a GPU.

    Args:
        model: the model.
        max_tokens: most tokens of the sequence.
    """
    if model_device(model).type == "cuda":
        from ernieq.runtime import PackedRuntime

        if not PackedRuntime.supports(model):
            return RuntimeEngine(PackedRuntime(model, max_tokens=max_tokens))
    return ForwardEngine(model, max_tokens)


def model_device(model: ErnieForCausalLM) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device


class ForwardEngine:
    """The model's own forward pass with a KV cache; runs everywhere.

    Args:
        model: the model.
        max_tokens: most tokens of the sequence.
    """

    def __init__(self, model: ErnieForCausalLM, max_tokens: int) -> None:
        parameter = next(model.parameters())
        self._model = model
        self._device = parameter.device
        self._cache = KVCache(model.config, 1, max_tokens, parameter.dtype, parameter.device)

    def prompt(self, token_ids: Sequence[int]) -> Tensor:
        """Take the first tokens, part by part."""
        ids = torch.tensor(token_ids, device=self._device)
        for part in ids.split(_PROMPT_PART):
            logits = self.step(part)
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Take one more token, or several at once."""
        with torch.inference_mode():
            logits: Tensor = self._model(token[None], self._cache, last_only=True)
        return logits[0, -1]


class RuntimeEngine:
    """The fast runtime of a packed model on a GPU.

    Args:
        runtime: for one sequence.
    """

    def __init__(self, runtime: PackedRuntime) -> None:
        self._runtime = runtime

    def prompt(self, token_ids: Sequence[int]) -> Tensor:
        """Take the first tokens."""
        with torch.inference_mode():
            return self._runtime.prefill(torch.tensor([list(token_ids)]))[0]

    def step(self, token: Tensor) -> Tensor:
        """Take one more."""
        with torch.inference_mode():
            return self._runtime.step(token)[0]
