"""ERNIE 4.5 for text, dense and MoE, in plain torch.

Modules carry the names of the checkpoint's tensors. Nothing here knows of bits: a packed model is this one with
its linears, its embedding, its head or the whole ``experts`` replaced from outside, so forward passes call
modules and never touch their weights. Left out: training, dropout, padding masks, multi-token prediction.

Shapes: B sequences, T tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ernieq.model.attention import Attention
from ernieq.model.cache import KVCache
from ernieq.model.config import ModelConfig
from ernieq.model.mlp import Mlp, SparseMlp
from ernieq.model.parameters import head_has_bias
from ernieq.model.rotary import Rotary

_HEAD_WEIGHT = "lm_head.weight"


class RmsNorm(nn.Module):
    """Divide by the root mean square, in float32, and multiply by a weight per channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        """(..., width) to the same."""
        normed = functional.rms_norm(states.float(), states.shape[-1:], eps=self._eps)
        return self.weight * normed.to(states.dtype)


class TokenEmbedding(nn.Embedding):
    """``nn.Embedding`` that draws no weights on the meta device: for that torch would import its compiler."""

    def reset_parameters(self) -> None:
        """Draw the weights, as torch does, if there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()


class DecoderLayer(nn.Module):
    """Attention and a feed-forward part, each on the normalised hidden states, each added to them.

    Attributes:
        is_moe: whether ``mlp`` is a ``SparseMlp``; otherwise it is an ``Mlp``.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.is_moe = config.is_moe_layer(index)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: Any = (
            SparseMlp(config)
            if self.is_moe
            else Mlp(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        )

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """Apply the layer.

        Args:
            hidden: (B, T, H).
            rotary: cosine and sine of the T positions, each (T, head_dim / 2) float32.
            cache: earlier tokens; the new ones are stored in it, and the caller advances it.

        Returns:
            (B, T, H); ``hidden`` is left as it was.
        """
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, cache)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    """Embedding, layers and the final norm; the part that checkpoints call ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._rotary = Rotary(config)
        self.embed_tokens: nn.Module = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 to (B, T, H), the normalised hidden states."""
        first = 0 if cache is None else cache.length
        tokens = token_ids.shape[1]
        rotary = self._rotary.angles(torch.arange(first, first + tokens, device=token_ids.device))
        hidden = self.embed_tokens(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, rotary, cache)
        if cache is not None:
            cache.advance(tokens)
        normed: Tensor = self.norm(hidden)
        return normed


class ErnieForCausalLM(nn.Module):
    """The language model; its state dict has exactly the names of ``expected_parameters(config)``.

    With tied embeddings ``lm_head.weight`` is the embedding's own parameter and has no name of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=head_has_bias(config))
        if config.tie_word_embeddings:
            self.tie_head()
            self.register_state_dict_post_hook(_drop_tied_head)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_tie_loaded_head)  # type: ignore[no-untyped-call]

    def tie_head(self) -> None:
        """Let head and embedding share one parameter, if both are plain modules; needed after an assignment."""
        head, embedding = self.lm_head, self.model.embed_tokens
        if isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding):
            head.weight = embedding.weight

    def forward(self, token_ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token.

        Args:
            token_ids: (B, T) int64, T at least 1.
            cache: tokens before these; these are added to it.
            last_only: whether only the last position is wanted.

        Returns:
            (B, T, V) float32, or (B, 1, V).
        """
        hidden = self.model(token_ids, cache)
        logits: Tensor = self.lm_head(hidden[:, -1:] if last_only else hidden)
        return logits.float()


def _drop_tied_head(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if isinstance(model.lm_head, nn.Linear):
        state.pop(prefix + _HEAD_WEIGHT, None)


def _tie_loaded_head(model: nn.Module, incompatible: Any) -> None:
    """A load that assigns new parameters breaks the tie; and a tied head is not missing."""
    assert isinstance(model, ErnieForCausalLM)
    model.tie_head()
    if _HEAD_WEIGHT in incompatible.missing_keys:
        incompatible.missing_keys.remove(_HEAD_WEIGHT)
