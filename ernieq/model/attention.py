"""Grouped-query attention with rotary positions.

Shapes: B sequences, T new tokens, S tokens seen including the new ones, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ernieq.model.cache import KVCache
from ernieq.model.config import ModelConfig
from ernieq.model.rotary import rotate_pairs

# Not cuDNN: it makes a plan for every number of tokens, on the processor, which takes longer than the step.
_AT_ONCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """Self-attention of decoder layer ``index``."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self._index = index
        self._head_dim = config.head_dim
        self._grouped = config.num_key_value_heads != config.num_attention_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.use_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.use_bias)

    def forward(self, normed: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Attend and project back.

        Args:
            normed: (B, T, H), the normalised hidden states.
            rotary: cosine and sine of the T new positions, each (T, head_dim / 2) float32.
            cache: earlier tokens; the new ones are stored in it.

        Returns:
            (B, T, H).
        """
        output: Tensor = self.o_proj(self.context(normed, rotary, cache))
        return output

    def context(self, normed: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """The input of ``o_proj``: (B, T, heads * head_dim); arguments as in ``forward``."""
        query = rotate_pairs(self._heads(self.q_proj(normed)), rotary)
        key = rotate_pairs(self._heads(self.k_proj(normed)), rotary)
        value = self._heads(self.v_proj(normed))
        tokens, past = normed.shape[1], 0
        if cache is not None:
            past = cache.length
            key, value = cache.update(self._index, key, value)
        if tokens == 1:
            return _attend_once(query, key, value)
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_causal_mask(tokens, past, query.device) if past else None,
            is_causal=past == 0,
            enable_gqa=self._grouped,
        )  # (B, heads, T, head_dim)
        return attended.transpose(1, 2).flatten(2)

    def _heads(self, states: Tensor) -> Tensor:
        return states.reshape(*states.shape[:2], -1, self._head_dim).transpose(1, 2)  # (B, heads, T, head_dim)


def _attend_once(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One new token, which sees everything: (B, 1, heads * head_dim).

    The heads that share keys stand where tokens would, so that the keys are read once for all of them, and are
    not copied for each.
    """
    folded = query.reshape(*key.shape[:2], -1, key.shape[3])  # (B, kv_heads, heads of each, head_dim)
    with sdpa_kernel(_AT_ONCE):
        attended: Tensor = scaled_dot_product_attention(folded, key, value)
    return attended.reshape(len(query), 1, -1)


def _causal_mask(tokens: int, past: int, device: torch.device) -> Tensor:
    """(T, past + T) bool: new token t sees the past and the new tokens up to itself."""
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(diagonal=past)
