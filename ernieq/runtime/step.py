"""One token of every sequence through the whole model, as kernels in a row.

Each addition to the residual stream is left to the norm that follows it, which is one kernel with the rotation
for the next product. The shared experts run on a stream of their own, beside router and routed experts. Nothing
waits for the host, and every buffer has a fixed address: the row can be captured.

Shapes: T tokens (one per sequence), H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ernieq.kernels.hadamard import unrotate
from ernieq.kernels.token_step import cuda as token_step
from ernieq.kernels.token_step.cuda import Rotated
from ernieq.kernels.trellis_matmul import cuda as matmul
from ernieq.runtime.cache import Buffers, Context
from ernieq.runtime.plan import GatedPlan, LayerPlan, ModelPlan, Product, RoutedPlan
from ernieq.trellis import TILE_SIDE

# Blocks of the attention kernel that are wanted for each processor of the GPU: fewer leave some idle.
_BLOCKS_PER_PROCESSOR = 2
_FEWEST_TOKENS_PER_SPLIT = 64


class Pending(NamedTuple):
    """What is still to be added to the residual stream: (T, H), and weighted rows (T k, H) of experts."""

    delta: Tensor | None = None
    expert_out: Tensor | None = None
    expert_weights: Tensor | None = None


class TokenStep:
    """Computes logits of the next token from one token of every sequence.

    Attributes:
        tokens: (T,) int64, what ``run`` reads.
        logits: (T, V) float32, what it writes.
    """

    def __init__(self, plan: ModelPlan, context: Context) -> None:
        self._plan = plan
        self._context = context
        self._buffers = Buffers(context.device)
        self._batch = context.batch
        self._side = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None
        config = plan.config
        self._splits = attention_splits(
            context.device, context.batch * config.num_key_value_heads, context.max_tokens
        )
        floats = token_step.attend_workspace(
            context.batch, config.num_attention_heads, config.head_dim, self._splits
        )
        self._workspace = torch.empty(max(floats, 1), device=context.device)
        self._places = TILE_SIDE * torch.arange(context.batch, device=context.device)
        self._hidden = self._buffers.take("hidden", self._batch, config.hidden_size)
        self.tokens = self._buffers.take("tokens", self._batch, dtype=torch.int64)
        self.logits = self._buffers.take("logits", self._batch, config.vocab_size)

    def run(self) -> None:
        """Put ``tokens`` behind the sequences: keys, values and ``logits`` are written, positions count on."""
        self._hidden.copy_(self._embedded())
        pending = Pending()
        for index, layer in enumerate(self._plan.layers):
            pending = self._attention(index, layer, pending)
            pending = self._feed_forward(layer, pending)
        self.finish(self._hidden, pending)
        token_step.advance(self._context.position)

    def finish(self, hidden: Tensor, pending: Pending | None = None) -> None:
        """Final norm and head: (T, H) float32, which is changed -> ``logits``."""
        rotated = self._norm(hidden, pending or Pending(), self._plan.norm, self._plan.head)
        self._multiply("head", self._plan.head, rotated, out=self.logits)

    def _embedded(self) -> Tensor:
        """Rows of the embedding: (T, H) float32. The band of 16 rows around each is decoded."""
        (table,), rotation = self._plan.embedding.parts, self._plan.embedding.rotation
        bands = torch.div(self.tokens, TILE_SIDE, rounding_mode="floor")
        words = table.words.index_select(0, bands)  # (T, H / 16, 8 K)
        scale = table.scale.view(-1, TILE_SIDE).index_select(0, bands).flatten()
        decoded = matmul.decode(words, scale, table.code, dtype=torch.float32)  # (16 T, H)
        rows = decoded.index_select(0, self._places + self.tokens % TILE_SIDE)
        return unrotate(rows, rotation.signs, rotation.block)

    def _attention(self, index: int, layer: LayerPlan, pending: Pending) -> Pending:
        config, context = self._plan.config, self._context
        rotated = self._norm(self._hidden, pending, layer.input_norm, layer.qkv)
        qkv = self._multiply("qkv", layer.qkv, rotated)
        attended = self._buffers.take("attended", self._batch, config.num_attention_heads * config.head_dim)
        token_step.attend(
            qkv,
            context.angles,
            context.keys[index],
            context.values[index],
            context.position,
            attended,
            self._workspace,
            self._splits,
        )
        return Pending(self._multiply("output", layer.output, self._rotate("output", attended, layer.output)))

    def _feed_forward(self, layer: LayerPlan, pending: Pending) -> Pending:
        normed = self._buffers.take("normed", self._batch, self._plan.config.hidden_size)
        rotation = layer.feed_forward_rotation
        rotated = self._buffers.rotated("feed-forward", *normed.shape)
        token_step.add_norm_rotate(
            self._hidden,
            *pending,
            layer.feed_forward_norm,
            self._plan.config.rms_norm_eps,
            rotation.signs,
            rotation.block,
            rotated,
            normed if layer.routed is not None else None,
        )
        if layer.routed is None:
            assert layer.gated is not None
            return Pending(self._gated(layer.gated, rotated))
        delta = None
        with self._beside():
            if layer.gated is not None:
                shared = layer.gated.gate_up
                alike = shared.rotation is rotation  # gather makes equal ones the same
                delta = self._gated(layer.gated, rotated if alike else self._rotate("shared", normed, shared))
        expert_out, weights = self._routed(layer.routed, normed, rotated)
        self._join()
        return Pending(delta, expert_out, weights)

    def _gated(self, gated: GatedPlan, rotated: Rotated) -> Tensor:
        inner = self._multiply("gate_up", gated.gate_up, rotated)
        activated = self._buffers.rotated("inner", self._batch, gated.down.columns)
        rotation = gated.down.rotation
        token_step.silu_mul_rotate(inner, rotation.signs, rotation.block, activated)
        return self._multiply("down", gated.down, activated)

    def _routed(self, routed: RoutedPlan, normed: Tensor, rotated: Rotated) -> tuple[Tensor, Tensor]:
        """Outputs of the selected experts (T k, H), and their weights (T, k)."""
        config = self._plan.config
        selected = self._buffers.take("selected", self._batch, config.moe_k, dtype=torch.int32)
        weights = self._buffers.take("weights", self._batch, config.moe_k)
        token_step.route(normed, routed.router, routed.bias, config.moe_norm_min, selected, weights)
        pairs = self._batch * config.moe_k
        up, down = routed.gate_up, routed.down
        inner = self._buffers.take("experts gate_up", pairs, up.rows)
        matmul.multiply_selected(*rotated, up.words, up.scale, up.code, selected, True, out=inner)
        activated = self._buffers.rotated("experts inner", pairs, down.columns)
        token_step.silu_mul_rotate(inner, down.rotation.signs, down.rotation.block, activated)
        out = self._buffers.take("experts down", pairs, down.rows)
        matmul.multiply_selected(*activated, down.words, down.scale, down.code, selected, False, out=out)
        return out, weights

    def _norm(self, hidden: Tensor, pending: Pending, norm: Tensor, reader: Product) -> Rotated:
        rotated = self._buffers.rotated("hidden", *hidden.shape)
        rotation, eps = reader.rotation, self._plan.config.rms_norm_eps
        token_step.add_norm_rotate(hidden, *pending, norm, eps, rotation.signs, rotation.block, rotated, None)
        return rotated

    def _rotate(self, name: str, x: Tensor, reader: Product) -> Rotated:
        rotated = self._buffers.rotated(f"{name} input", *x.shape)
        token_step.rotate(x, reader.rotation.signs, reader.rotation.block, rotated)
        return rotated

    def _multiply(self, name: str, product: Product, rotated: Rotated, out: Tensor | None = None) -> Tensor:
        out = self._buffers.take(name, self._batch, product.rows) if out is None else out
        if len(product.parts) == 1:
            part = product.parts[0]
            matmul.multiply(*rotated, part.words, part.scale, part.code, out=out)
        else:
            outs = []
            for number, part in enumerate(product.parts):
                outs.append(self._buffers.take(f"{name} {number}", self._batch, part.rows))
                matmul.multiply(*rotated, part.words, part.scale, part.code, out=outs[-1])
            torch.cat(outs, dim=1, out=out)
        return out if product.bias is None else out.add_(product.bias)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the second stream what follows; ``_join`` waits for it."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._context.device))
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self._context.device).wait_stream(self._side)


def attention_splits(device: torch.device, heads: int, max_tokens: int) -> int:
    """Parts into which a context is cut, so that all of a GPU works on the few heads of a token.

    Args:
        device: the GPU.
        heads: key-value heads of all sequences.
        max_tokens: longest context.
    """
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = -(-_BLOCKS_PER_PROCESSOR * processors // heads)
    return max(1, min(wanted, -(-max_tokens // _FEWEST_TOKENS_PER_SPLIT)))
