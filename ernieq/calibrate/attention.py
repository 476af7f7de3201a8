"""Calibration of the attention of one layer: inputs of q, k, v; inputs of o; the step to the next sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.calibrate.moments import Moments
from ernieq.calibrate.narrow import full_context
from ernieq.calibrate.precision import calibrating
from ernieq.calibrate.streams import Streams
from ernieq.model import DecoderLayer


class AttentionPass:
    """Runs the attention of one layer over both streams.

    Args:
        reference: the layer with its bf16 weights, widened, or narrow (``narrow_layer``) on a GPU.
        quantized: the same layer; its projections are replaced by decoded ones while the pass goes on.
        streams: hidden states before the attention; ``advance`` moves them behind it.
        rotary: cosine and sine of all positions of a window.
    """

    def __init__(
        self,
        reference: DecoderLayer,
        quantized: DecoderLayer,
        streams: Streams,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        self._reference = reference
        self._quantized = quantized
        self._streams = streams
        self._rotary = rotary
        self._contexts: Streams | None = None

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self._streams.device

    @calibrating
    def input_moments(self) -> Moments:
        """Moments of the input of q, k and v; the residual is what the bf16 model's input has beyond it."""
        streams, norm = self._streams, self._reference.input_layernorm
        width = streams.shape[2]
        moments = Moments(width, residual_rows=width, device=self.device)
        for batch in streams.batches():
            inputs = norm(streams.load(streams.quantized, batch).float()).reshape(-1, width)
            wanted = norm(streams.load(streams.reference, batch).float()).reshape(-1, width)
            moments.add(inputs, residuals=wanted - inputs)
        return moments

    @calibrating
    def context_moments(self) -> Moments:
        """Moments of the input of o; the residual is what the stream lacks beyond the bf16 weight's output.

        The contexts are kept for ``advance``.
        """
        streams, output = self._streams, self._reference.self_attn.o_proj
        hidden = streams.shape[2]
        self._contexts = streams.empty(output.in_features)
        moments = Moments(output.in_features, residual_rows=hidden, device=self.device)
        for batch in streams.batches():
            before = (
                streams.load(streams.reference, batch).float(),
                streams.load(streams.quantized, batch).float(),
            )
            wanted, context = self._keep_contexts(self._contexts, batch, *before)
            lacking = before[0] - before[1] + (wanted - context) @ output.weight.float().T
            moments.add(context.reshape(-1, output.in_features), residuals=lacking.reshape(-1, hidden))
        return moments

    @calibrating
    def advance(self) -> None:
        """Add the attention's output to both streams; call it when all four projections are replaced."""
        streams, contexts = self._streams, self._contexts or self._all_contexts()
        for batch in streams.batches():
            for stream, kept, layer in (
                (streams.reference, contexts.reference, self._reference),
                (streams.quantized, contexts.quantized, self._quantized),
            ):
                context = contexts.load(kept, batch).float()
                streams.add(stream, batch, layer.self_attn.o_proj(context))
        self._contexts = None

    def _all_contexts(self) -> Streams:
        """Contexts of all tokens, for a layer whose moments nobody needs."""
        streams = self._streams
        contexts = streams.empty(self._reference.self_attn.o_proj.in_features)
        for batch in streams.batches():
            before = (streams.load(stream, batch).float() for stream in (streams.reference, streams.quantized))
            self._keep_contexts(contexts, batch, *before)
        return contexts

    def _keep_contexts(
        self, contexts: Streams, batch: slice, reference: Tensor, quantized: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Contexts of a batch in both streams, as they are before they take the dtype of the streams."""
        wanted = self._context(self._reference, reference)
        context = self._context(self._quantized, quantized)
        contexts.store(contexts.reference, batch, wanted)
        contexts.store(contexts.quantized, batch, context)
        return wanted, context

    def _context(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        normed = layer.input_layernorm(hidden)
        if hidden.is_cuda:
            return full_context(layer.self_attn, normed, self._rotary)
        return layer.self_attn.context(normed, self._rotary, None)
