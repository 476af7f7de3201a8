"""Calibration of the attention of one layer: inputs of q, k, v; inputs of o; the step to the next sub-layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.calibrate.moments import Moments
from ernieq.calibrate.streams import Streams
from ernieq.model import DecoderLayer


class AttentionPass:
    """Runs the attention of one layer over both streams.

    Args:
        reference: the layer with its bf16 weights, widened.
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

    @torch.no_grad()
    def input_moments(self) -> Moments:
        """Moments of the input of q, k and v; the residual is what the bf16 model's input has beyond it."""
        streams, norm = self._streams, self._reference.input_layernorm
        width = streams.shape[2]
        moments = Moments(width, residual_rows=width)
        for batch in streams.batches():
            inputs = norm(streams.quantized[batch].float()).reshape(-1, width)
            wanted = norm(streams.reference[batch].float()).reshape(-1, width)
            moments.add(inputs, residuals=wanted - inputs)
        return moments

    @torch.no_grad()
    def context_moments(self) -> Moments:
        """Moments of the input of o; the residual is what the stream lacks beyond the bf16 weight's output."""
        streams, output = self._streams, self._reference.self_attn.o_proj
        hidden = streams.shape[2]
        self._contexts = Streams(
            *(torch.empty(*streams.shape[:2], output.in_features, dtype=streams.reference.dtype) for _ in "ab")
        )
        moments = Moments(output.in_features, residual_rows=hidden)
        for batch in streams.batches():
            before = streams.reference[batch].float(), streams.quantized[batch].float()
            wanted = self._context(self._reference, before[0])
            context = self._context(self._quantized, before[1])
            self._contexts.reference[batch] = wanted
            self._contexts.quantized[batch] = context
            lacking = before[0] - before[1] + (wanted - context) @ output.weight.T
            moments.add(context.reshape(-1, output.in_features), residuals=lacking.reshape(-1, hidden))
        return moments

    @torch.no_grad()
    def advance(self) -> None:
        """Add the attention's output to both streams; call it when all four projections are replaced."""
        for batch in self._streams.batches():
            for stream, contexts, layer in (
                (self._streams.reference, self._contexts.reference, self._reference),
                (self._streams.quantized, self._contexts.quantized, self._quantized),
            ):
                stream[batch] += layer.self_attn.o_proj(contexts[batch].float()).to(stream.dtype)
        del self._contexts

    def _context(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        return layer.self_attn.context(layer.input_layernorm(hidden), self._rotary, None)
