"""Calibration of the feed-forward part of one layer: dense, or routed experts with shared ones beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.calibrate.moments import Moments
from ernieq.calibrate.streams import Streams
from ernieq.model import DecoderLayer, Mlp

# Tokens of the whole layer that every expert is shown, so that one that was hardly chosen still has a Hessian
# of its own hidden units to lean on. At least twice the width is taken.
PRIOR_TOKENS = 4096
CHUNK_TOKENS = 8192


class MlpPass:
    """Runs the feed-forward part of one layer over both streams.

    The order is: ``input_moments``; then for every expert ``expert_input_moments``, once its gate and up are
    replaced ``expert_down_moments``, and once its down is replaced ``add_expert``; then, once gate and up of
    the dense or shared part are replaced, ``down_moments``; and ``advance``.

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
        self._active: list[tuple[Tensor, Tensor, Tensor]] = []
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
        moments = Moments(self._streams.shape[2])
        for tokens, weights in self._routed(expert):
            inputs = self._norm(self._streams.rows(self._streams.quantized, tokens))
            moments.add(inputs, weights.square())
        return moments

    @torch.no_grad()
    def expert_down_moments(self, expert: int) -> tuple[Moments, Moments]:
        """Moments of the input of an expert's down: over its routed tokens, and over tokens of the whole layer.

        The activations of the routed tokens are kept for ``add_expert``.
        """
        width, hidden = self._reference.mlp.experts[expert].down_proj.in_features, self._streams.shape[2]
        own, prior = Moments(width, residual_rows=hidden), Moments(width, residual_rows=hidden)
        self._active = []
        for tokens, weights in self._routed(expert):
            active, residual = self._activations(expert, tokens)
            own.add(active, weights.square(), residual)
            self._active.append((tokens, weights, active))
        for tokens in self._spread_tokens(max(PRIOR_TOKENS, 2 * width)).split(CHUNK_TOKENS):
            active, residual = self._activations(expert, tokens)
            prior.add(active, residuals=residual)
        return own, prior

    @torch.no_grad()
    def add_expert(self, expert: int) -> None:
        """Add the output of an expert, whose down is now replaced too, to the next hidden states."""
        down = self._quantized.mlp.experts[expert].down_proj
        target = self._next.quantized.view(-1, self._streams.shape[2])
        for tokens, weights, active in self._active:
            target.index_add_(0, tokens, (down(active) * weights[:, None]).to(target.dtype))
        self._active = []

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

    def _routed(self, expert: int) -> list[tuple[Tensor, Tensor]]:
        """Flat indices of the tokens routed to an expert, and their routing weights, in chunks."""
        assert self._selected is not None
        assert self._weights is not None
        tokens, choice = (self._selected == expert).nonzero(as_tuple=True)
        weights = self._weights[tokens, choice]
        return list(zip(tokens.split(CHUNK_TOKENS), weights.split(CHUNK_TOKENS), strict=True))

    def _spread_tokens(self, count: int) -> Tensor:
        total = self._streams.shape[0] * self._streams.shape[1]
        return torch.arange(0, total, max(1, total // count))

    def _activations(self, expert: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the expert's down, and what the bf16 model's output has beyond the bf16 weight's on it."""
        plain, coded = self._reference.mlp.experts[expert], self._quantized.mlp.experts[expert]
        active = _activation(coded, self._norm(self._streams.rows(self._streams.quantized, tokens)))
        wanted = _activation(plain, self._norm(self._streams.rows(self._streams.reference, tokens)))
        return active, (wanted - active) @ plain.down_proj.weight.T


def _mlp(layer: DecoderLayer, path: str) -> Mlp:
    module = layer.get_submodule(path)
    assert isinstance(module, Mlp)
    return module


def _activation(mlp: Mlp, inputs: Tensor) -> Tensor:
    return mlp.activate(mlp.gate_proj(inputs), mlp.up_proj(inputs))
