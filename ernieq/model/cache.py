"""Keys and values of the tokens seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import UsageError
from ernieq.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of all layers.

    ``update`` writes behind the first ``length`` tokens and leaves ``length`` as it is, so that every layer of
    one forward pass writes to the same place; ``advance`` then counts the tokens. The model's forward does
    both; whoever runs layers one by one calls ``advance`` after the last. A pass that was interrupted leaves
    the cache as it was.

    Args:
        config: the model.
        batch: sequences, all of the same length.
        max_tokens: tokens that fit, prompt and completion together.
        dtype: dtype of the stored keys and values.
        device: where they are stored.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        max_tokens: int = 4096,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_tokens, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store what one layer made of the new tokens.

        Args:
            layer: number of the layer.
            keys: (B, kv_heads, T, head_dim), rotated.
            values: like ``keys``.

        Returns:
            Keys and values of all tokens including the new ones, (B, kv_heads, length + T, head_dim), in the
            dtype of ``keys``.

        Raises:
            UsageError: the tokens do not fit.
        """
        end = self.length + keys.shape[2]
        if end > self.max_tokens:
            raise UsageError(f"the KV cache holds {self.max_tokens} tokens; {end} are needed")
        self._keys[layer, :, :, self.length : end] = keys
        self._values[layer, :, :, self.length : end] = values
        stored = self._keys[layer, :, :, :end], self._values[layer, :, :, :end]
        return stored[0].to(keys.dtype), stored[1].to(values.dtype)

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has stored."""
        assert 0 <= self.length + tokens <= self.max_tokens
        self.length += tokens
