"""A prompt through the model, in parts that bound the memory of a layer.

The residual stream is float32, products are float16 with a scale per row, keys and values go to the context.

Shapes: B sequences, T tokens of a part, N = B T rows, H hidden width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from ernieq.kernels.hadamard import unrotate
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.model.rotary import rotate_pairs
from ernieq.runtime.cache import Context
from ernieq.runtime.plan import LayerPlan, ModelPlan
from ernieq.runtime.products import DecodingBuffer, multiply, rotate, run_gated
from ernieq.runtime.routed import add_routed
from ernieq.trellis import TILE_SIDE

# Rows that go through a layer together: enough that an expert's share pays for decoding it.
PART_ROWS = 4096

# Tokens looked up together; a band of 16 rows is decoded for each: 21 MB at a width of 2560.
_LOOKUP_TOKENS = 128


class Prefill:
    """Runs prompts; the context's length is the caller's to count."""

    def __init__(self, plan: ModelPlan, context: Context) -> None:
        self._plan = plan
        self._context = context
        self._buffer = DecodingBuffer(plan, context.device)

    def run(self, token_ids: Tensor) -> Tensor:
        """Put tokens behind those of the context.

        Args:
            token_ids: (B, T) int64 on the context's device; they fit, and are in the vocabulary.

        Returns:
            (B, H) float32, what the last layer made of the last token of each sequence.
        """
        step = max(PART_ROWS // token_ids.shape[0], 1)
        past, tokens = self._context.length, token_ids.shape[1]
        hidden = None
        for start in range(0, tokens, step):
            part = token_ids[:, start : start + step]
            hidden = self._part(part, past + start, last=start + step >= tokens)
        assert hidden is not None, "there is at least one token"
        return hidden

    def _part(self, token_ids: Tensor, past: int, *, last: bool) -> Tensor | None:
        """One part behind ``past`` tokens: (B, T) -> (B, H) if it is the last, else None."""
        hidden = self._embedded(token_ids.flatten())  # (N, H)
        for index, layer in enumerate(self._plan.layers):
            attended = self._attended(index, layer, hidden, past, token_ids.shape)
            if index == len(self._plan.layers) - 1:
                if not last:
                    return None  # keys and values are all that later parts need of it
                hidden, attended = (_last_rows(rows, token_ids.shape) for rows in (hidden, attended))
            hidden += multiply(layer.output, rotate(attended, layer.output.rotation), self._buffer)
            del attended
            self._feed_forward(layer, hidden)
        return _last_rows(hidden, token_ids.shape) if hidden.shape[0] > token_ids.shape[0] else hidden

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding: (N,) int64 -> (N, H) float32."""
        (table,), rotation = self._plan.embedding.parts, self._plan.embedding.rotation
        hidden = torch.empty(token_ids.shape[0], table.columns, device=token_ids.device)
        bands_of_scale = table.scale.view(-1, TILE_SIDE)
        places = TILE_SIDE * torch.arange(_LOOKUP_TOKENS, device=token_ids.device)
        for start in range(0, token_ids.shape[0], _LOOKUP_TOKENS):
            ids = token_ids[start : start + _LOOKUP_TOKENS]
            bands = torch.div(ids, TILE_SIDE, rounding_mode="floor")
            words, scale = table.words.index_select(0, bands), bands_of_scale.index_select(0, bands).flatten()
            decoded = matmul.decode(words, scale, table.code, dtype=torch.float32)  # (16 n, H)
            rows = decoded.index_select(0, places[: ids.shape[0]] + ids % TILE_SIDE)
            hidden[start : start + ids.shape[0]] = unrotate(rows, rotation.signs, rotation.block)
        return hidden

    def _attended(self, index: int, layer: LayerPlan, hidden: Tensor, past: int, shape: torch.Size) -> Tensor:
        """What attention gives before its output product: (N, heads * head_dim) float32."""
        batch, tokens = shape
        config, context = self._plan.config, self._context
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = multiply(
            layer.qkv, rotate(self._norm(hidden, layer.input_norm), layer.qkv.rotation), self._buffer
        )
        states = qkv.view(batch, tokens, heads + 2 * kv_heads, head_dim).transpose(1, 2)
        angles = context.angles[past : past + tokens].unbind(-1)
        # In float16, where keys of the context are: (B, heads, T, head_dim).
        query = rotate_pairs(states[:, :heads], (angles[0], angles[1])).half()
        keys = rotate_pairs(states[:, heads : heads + kv_heads], (angles[0], angles[1]))
        context.keys[index, :, :, past : past + tokens] = keys
        context.values[index, :, :, past : past + tokens] = states[:, heads + kv_heads :]
        del qkv, states, keys
        attended = scaled_dot_product_attention(
            query,
            context.keys[index, :, :, : past + tokens],
            context.values[index, :, :, : past + tokens],
            # The token in row t sees the past and the first t + 1 of these.
            attn_mask=cast(Any, causal_lower_right(tokens, past + tokens)) if past and tokens > 1 else None,
            is_causal=past == 0 and tokens > 1,
            enable_gqa=heads != kv_heads,
        )
        return attended.transpose(1, 2).reshape(batch * tokens, heads * head_dim).float()

    def _feed_forward(self, layer: LayerPlan, hidden: Tensor) -> None:
        """Add the feed-forward part to (N, H) float32."""
        config = self._plan.config
        normed = self._norm(hidden, layer.feed_forward_norm)
        rotation = layer.feed_forward_rotation
        rotated = rotate(normed, rotation)
        if layer.gated is not None:
            own = layer.gated.gate_up.rotation
            hidden += run_gated(layer.gated, rotated if own is rotation else rotate(normed, own), self._buffer)
        if layer.routed is not None:
            add_routed(hidden, normed, rotated, layer.routed, config.moe_k, config.moe_norm_min)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, hidden.shape[-1:], weight, self._plan.config.rms_norm_eps)


def _last_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """The last row of each sequence: (B T, width) -> (B, width)."""
    return rows.view(*shape, -1)[:, -1].contiguous()
