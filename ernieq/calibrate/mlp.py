"""Calibration of the feed-forward part of one layer: dense, or routed experts with shared ones beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.calibrate.moments import Moments
from ernieq.calibrate.streams import Streams
from ernieq.model import DecoderLayer, Mlp

# Tokens of the whole layer that every expert is shown, so that one that was hardly chosen still has a Hessian of
# its own hidden units to lean on. At least twice the width is taken.
PRIOR_TOKENS = 4096


class MlpPass:
    """Runs the feed-forward part of one layer over both streams.

    The order is: ``input_moments``; for every expert ``expert_input_moments`` and, once its gate and up are
    replaced, ``expert_down_moments``; ``add_experts``; then, once gate and up of the dense or shared part are
    replaced, ``down_moments``; ``advance``.

    Args:
        reference: the layer with its bf16 weights, widened.
        quantized: the same layer; its projections are replaced by decoded ones while the pass goes on.
        streams: hidden states before the feed-forward part; ``advance`` moves them behind it.
    """

    def __init__(self, reference: DecoderLayer, quantized: DecoderLayer, streams: Streams) -> None:
        self._reference = reference
        self._quantized = quantized
        self._streams = streams
        self._norm = reference.post_attention_layernorm
        self._selected: Tensor | None = None
        self._weights: Tensor | None = None
        self._next = Streams(streams.reference.clone(), streams.quantized.clone())

    @torch.no_grad()
    def input_moments(self) -> Moments:
        """Moments of the input of gate and up over all tokens; experts are routed on the way."""
        streams, width = self._streams, self._streams.shape[2]
        moments = Moments(width, residual_rows=width)
        selected, weights = [], []
        for batch in streams.batches():
            inputs = self._norm(streams.quantized[batch].float()).reshape(-1, width)
            wanted = self._norm(streams.reference[batch].float()).reshape(-1, width)
            moments.add(inputs, residuals=wanted - inputs)
            self._next.reference[batch] += (
                self._reference.mlp(wanted).view_as(streams.reference[batch]).to(streams.reference.dtype)
            )
            if self._reference.is_moe:
                routing = self._quantized.mlp.route(inputs)
                selected.append(routing.selected)
                weights.append(routing.weights)
        if selected:
            self._selected, self._weights = torch.cat(selected), torch.cat(weights)
        return moments

    @torch.no_grad()
    def expert_input_moments(self, expert: int) -> Moments:
        """Moments of the input of an expert's gate and up, over its routed tokens, weighted by p squared."""
        tokens, importance = self._routed(expert)
        moments = Moments(self._streams.shape[2])
        for part, weight in _chunks(tokens, importance):
            moments.add(self._norm(self._streams.rows(self._streams.quantized, part)), weight)
        return moments

    @torch.no_grad()
    def expert_down_moments(self, expert: int) -> tuple[Moments, Moments]:
        """Moments of the input of an expert's down: over its routed tokens, and over tokens of the whole layer."""
        plain, coded = self._reference.mlp.experts[expert], self._quantized.mlp.experts[expert]
        width = plain.down_proj.in_features
        own = Moments(width, residual_rows=self._streams.shape[2])
        prior = Moments(width, residual_rows=self._streams.shape[2])
        for part, weight in _chunks(*self._routed(expert)):
            self._add_activations(own, plain, coded, part, weight)
        for part, _ in _chunks(self._spread_tokens(max(PRIOR_TOKENS, 2 * width)), None):
            self._add_activations(prior, plain, coded, part, None)
        return own, prior

    @torch.no_grad()
    def add_experts(self) -> None:
        """Add the output of the quantized experts to the next hidden states."""
        width = self._streams.shape[2]
        for batch in self._streams.batches():
            inputs = self._norm(self._streams.quantized[batch].float()).reshape(-1, width)
            output = self._quantized.mlp.experts(inputs, self._quantized.mlp.route(inputs))
            target = self._next.quantized[batch]
            target += output.view_as(target).to(target.dtype)

    @torch.no_grad()
    def down_moments(self, path: str) -> Moments:
        """Moments of the input of the dense or shared down; the residual is all that the stream still lacks."""
        plain, coded = _mlp(self._reference, path), _mlp(self._quantized, path)
        width, hidden = plain.down_proj.in_features, self._streams.shape[2]
        moments = Moments(width, residual_rows=hidden)
        for batch in self._streams.batches():
            inputs = self._norm(self._streams.quantized[batch].float()).reshape(-1, hidden)
            active = _activation(coded, inputs)
            lacking = self._next.reference[batch].float() - self._next.quantized[batch].float()
            moments.add(active, residuals=lacking.reshape(-1, hidden) - plain.down_proj(active))
        return moments

    @torch.no_grad()
    def advance(self, path: str | None) -> None:
        """Add the dense or shared part, if there is one, and move the streams behind the layer."""
        hidden = self._streams.shape[2]
        if path is not None:
            coded = _mlp(self._quantized, path)
            for batch in self._streams.batches():
                inputs = self._norm(self._streams.quantized[batch].float()).reshape(-1, hidden)
                target = self._next.quantized[batch]
                target += coded(inputs).view_as(target).to(target.dtype)
        self._streams.reference.copy_(self._next.reference)
        self._streams.quantized.copy_(self._next.quantized)

    def _routed(self, expert: int) -> tuple[Tensor, Tensor]:
        """Flat indices of the tokens routed to an expert, and their squared routing weights."""
        assert self._selected is not None and self._weights is not None
        tokens, choice = (self._selected == expert).nonzero(as_tuple=True)
        return tokens, self._weights[tokens, choice].square()

    def _spread_tokens(self, count: int) -> Tensor:
        total = self._streams.shape[0] * self._streams.shape[1]
        return torch.arange(0, total, max(1, total // count))

    def _add_activations(
        self, moments: Moments, plain: Mlp, coded: Mlp, tokens: Tensor, weight: Tensor | None
    ) -> None:
        active = _activation(coded, self._norm(self._streams.rows(self._streams.quantized, tokens)))
        wanted = _activation(plain, self._norm(self._streams.rows(self._streams.reference, tokens)))
        moments.add(active, weight, (wanted - active) @ plain.down_proj.weight.T)


def _mlp(layer: DecoderLayer, path: str) -> Mlp:
    module = layer.get_submodule(path)
    assert isinstance(module, Mlp)
    return module


def _activation(mlp: Mlp, inputs: Tensor) -> Tensor:
    return mlp.activate(mlp.gate_proj(inputs), mlp.up_proj(inputs))


def _chunks(tokens: Tensor, weights: Tensor | None, size: int = 8192) -> list[tuple[Tensor, Tensor | None]]:
    return [
        (tokens[at : at + size], None if weights is None else weights[at : at + size])
        for at in range(0, len(tokens), size)
    ]
