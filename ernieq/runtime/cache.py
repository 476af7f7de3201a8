"""Memory of a runtime that stays where it is: keys and values, positions, the buffers of a token step."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import UsageError
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.model import ModelConfig, Rotary


class Context:
    """What sequences of one length have left behind: keys and values of every layer, and their length.

    Attributes:
        keys: (layers, batch, kv_heads, max_tokens, head_dim) float16, rotated.
        values: like ``keys``.
        angles: (max_tokens, head_dim / 2, 2) float32, cosine and sine of every position.
        position: (batch,) int32, where the next token goes; a token step counts it on by itself.
        length: the same number on the host.
    """

    def __init__(self, config: ModelConfig, *, max_tokens: int, batch: int, device: torch.device) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_tokens, config.head_dim)
        # Zeros: what lies behind the end may be multiplied by a weight of zero, which NaN would survive.
        self.keys = torch.zeros(shape, dtype=torch.float16, device=device)
        self.values = torch.zeros(shape, dtype=torch.float16, device=device)
        angles = Rotary(config).angles(torch.arange(max_tokens, device=device))
        self.angles = torch.stack(angles, dim=-1).contiguous()
        self.position = torch.zeros(batch, dtype=torch.int32, device=device)
        self.max_tokens = max_tokens
        self.batch = batch
        self.length = 0

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.keys.device

    def require(self, tokens: int) -> None:
        """Check that more tokens fit.

        Raises:
            UsageError: they do not.
        """
        needed = self.length + tokens
        if needed > self.max_tokens:
            raise UsageError(f"the context holds {self.max_tokens} tokens; {needed} are needed")

    def seek(self, length: int) -> None:
        """Continue behind the first ``length`` tokens."""
        self.length = length
        self.position.fill_(length)


def context_bytes(config: ModelConfig, *, max_tokens: int, batch: int) -> int:
    """Bytes of the keys and values of a ``Context``."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * torch.float16.itemsize * config.num_hidden_layers * batch * max_tokens * width


class Buffers:
    """Named tensors that are allocated once, so that a captured graph finds them again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[tuple[object, ...], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of this name, shape and dtype; its content is whatever was left there."""
        key = (name, shape, dtype)
        if key not in self._held:
            self._held[key] = torch.zeros(shape, dtype=dtype, device=self._device)
        return self._held[key]

    def rotated(self, name: str, rows: int, columns: int) -> Rotated:
        """A buffer for rotated inputs of a product."""
        return Rotated(self.take(name, rows, columns, dtype=torch.float16), self.take(f"{name} scale", rows))
