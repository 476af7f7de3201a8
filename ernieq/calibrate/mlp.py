"""Calibration of the feed-forward part of one layer: dense, or routed experts with shared ones beside them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernieq.calibrate.moments import Moments, TokenWeights
from ernieq.calibrate.precision import calibrating
from ernieq.calibrate.routed import CHUNK_TOKENS, RoutedTokens
from ernieq.calibrate.streams import Streams
from ernieq.kernels.precision import steady_modules, steady_products
from ernieq.model import DecoderLayer, Mlp

# Tokens of the whole layer that every expert is shown, so that one that was hardly chosen still has a Hessian
# of its own hidden units to lean on. At least twice the width is taken.
PRIOR_TOKENS = 4096

# Streams that stay in the processor's memory are shown to a batch of experts this many tokens at a time.
SEGMENT_TOKENS = 16384


class MlpPass:
    """Runs the feed-forward part of one layer over both streams.

    At the beginning the bf16 model is run, and experts are chosen. Then, for every batch of experts, come
    ``experts_down_moments`` once their gates and ups are replaced, and ``add_experts`` once their downs are;
    ``down_moments`` once gate and up of the dense or shared part are replaced; and ``advance``. Moments that
    nobody needs may be left out; those of inputs can be asked for at any time before ``advance``.

    Args:
        reference: the layer with its bf16 weights, widened, or narrow (``narrow_layer``) on a GPU.
        quantized: the same layer; its projections are replaced by decoded ones while the pass goes on.
        streams: hidden states before the feed-forward part; ``advance`` moves them behind it.
    """

    def __init__(self, reference: DecoderLayer, quantized: DecoderLayer, streams: Streams) -> None:
        self._reference = reference
        self._quantized = quantized
        self._streams = streams
        self._norm = reference.post_attention_layernorm
        self._routed: RoutedTokens | None = None
        self._active: dict[int, list[Tensor]] = {}
        self._spread: tuple[Tensor, Tensor] | None = None
        self._next = streams.clone()
        self._run_reference()

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self._streams.device

    @calibrating
    def input_moments(self) -> Moments:
        """Moments of the input of gate and up over all tokens; the residual is the bf16 model's beyond it."""
        streams, width = self._streams, self._streams.shape[2]
        moments = self._moments(width, width)
        for batch in streams.batches():
            inputs, wanted = self._inputs(batch)
            moments.add(inputs, residuals=wanted - inputs)
        return moments

    def expert_weights(self, expert: int) -> TokenWeights:
        """Tokens of an expert and their weights, p squared."""
        found, routed = TokenWeights(), self._routing()
        for number in range(len(routed.segments)):
            for tokens, weights in routed.chunks(expert, number):
                if len(tokens):
                    found.count(len(tokens), weights.square())
        return found

    def expert_input_moments(self, expert: int) -> Moments:
        """``experts_input_moments`` of one expert."""
        return self.experts_input_moments([expert])[0]

    @calibrating
    def experts_input_moments(self, experts: Sequence[int]) -> list[Moments]:
        """Moments of the input of each expert's gate and up, over its routed tokens, weighted by p squared."""
        routed, found = self._routing(), [self._moments(self._streams.shape[2]) for _ in experts]
        for number, segment in enumerate(routed.segments):
            rows = self._segment(self._streams.quantized, segment)
            for expert, moments in zip(experts, found, strict=True):
                for tokens, weights in routed.chunks(expert, number):
                    moments.add(self._norm(rows[tokens].float()), weights.square())
        return found

    def expert_down_moments(self, expert: int) -> tuple[Moments, Moments]:
        """``experts_down_moments`` of one expert."""
        return self.experts_down_moments([expert])[0]

    @calibrating
    def experts_down_moments(self, experts: Sequence[int]) -> list[tuple[Moments, Moments]]:
        """Moments of the input of each expert's down: over its routed tokens, and over the whole layer's.

        On a processor the activations of the routed tokens are kept for ``add_experts``; a GPU has less memory
        and repeats them at once.
        """
        routed, hidden = self._routing(), self._streams.shape[2]
        width = self._reference.mlp.experts[experts[0]].down_proj.in_features
        found = [(self._moments(width, hidden), self._moments(width, hidden)) for _ in experts]
        self._active = {expert: [] for expert in experts}
        for number, segment in enumerate(routed.segments):
            coded = self._segment(self._streams.quantized, segment)
            plain = self._segment(self._streams.reference, segment)
            for expert, (own, _) in zip(experts, found, strict=True):
                for tokens, weights in routed.chunks(expert, number):
                    inputs, wanted = (self._norm(rows[tokens].float()) for rows in (coded, plain))
                    active, residual = self._activations(expert, inputs, wanted)
                    own.add(active, weights.square(), residual)
                    if self.device.type == "cpu":
                        self._active[expert].append(active)
        for expert, (_, prior) in zip(experts, found, strict=True):
            spread = (rows.split(CHUNK_TOKENS) for rows in self._spread_inputs(max(PRIOR_TOKENS, 2 * width)))
            for inputs, wanted in zip(*spread, strict=True):
                active, residual = self._activations(expert, inputs, wanted)
                prior.add(active, residuals=residual)
        return found

    def add_expert(self, expert: int) -> None:
        """``add_experts`` of one expert."""
        self.add_experts([expert])

    @calibrating
    def add_experts(self, experts: Sequence[int]) -> None:
        """Add the outputs of experts, whose downs are now replaced too, to the next hidden states."""
        routed = self._routing()
        for number, segment in enumerate(routed.segments):
            target = self._segment(self._next.quantized, segment)
            rows = self._segment(self._streams.quantized, segment)
            for expert in experts:
                coded, kept = self._quantized.mlp.experts[expert], iter(self._active.get(expert, ()))
                for tokens, weights in routed.chunks(expert, number):
                    active = next(kept, None)
                    with steady_products(len(tokens), self.device):
                        if active is None:
                            active = _activation(coded, self._norm(rows[tokens].float()))
                        output = coded.down_proj(active) * weights[:, None]
                    target.index_add_(0, tokens, output.to(target.dtype))
            if not self._next.resident:
                self._next.store(self._next.quantized.view(-1, target.shape[1]), segment, target)
        self._active = {}

    @calibrating
    def down_moments(self, path: str) -> Moments:
        """Moments of the input of the dense or shared down; the residual is all that the stream still lacks."""
        plain, coded = _mlp(self._reference, path), _mlp(self._quantized, path)
        width, hidden = plain.down_proj.in_features, self._streams.shape[2]
        moments, ahead = self._moments(width, hidden), self._next
        for batch in self._streams.batches():
            rows = self._streams.load(self._streams.quantized, batch)
            active = _activation(coded, self._norm(rows.float()).reshape(-1, hidden))
            lacking = ahead.load(ahead.reference, batch).float() - ahead.load(ahead.quantized, batch).float()
            moments.add(active, residuals=lacking.reshape(-1, hidden) - plain.down_proj(active))
        return moments

    @calibrating
    def advance(self, path: str | None) -> None:
        """Add the dense or shared part, if there is one, and move the streams behind the layer."""
        streams, hidden = self._streams, self._streams.shape[2]
        if path is not None:
            coded = _mlp(self._quantized, path)
            for batch in streams.batches():
                rows = streams.load(streams.quantized, batch)
                output = coded(self._norm(rows.float()).reshape(-1, hidden))
                self._next.add(self._next.quantized, batch, output.view_as(rows))
        self._next.wait()
        streams.reference, streams.quantized = self._next.reference, self._next.quantized

    @calibrating
    def _run_reference(self) -> None:
        """Move the bf16 model's stream, and choose the experts of every token in the quantized one."""
        streams, selected, weights = self._streams, [], []
        experts = self._reference.mlp.experts if self._reference.is_moe else ()
        for batch in streams.batches():
            inputs, wanted = self._inputs(batch)
            with steady_modules(experts, self.device):
                output = self._reference.mlp(wanted).view_as(streams.reference[batch])
            self._next.add(self._next.reference, batch, output)
            if self._reference.is_moe:
                routing = self._quantized.mlp.route(inputs)
                selected.append(routing.selected)
                weights.append(routing.weights)
        if selected:
            tokens = streams.shape[0] * streams.shape[1]
            segment = tokens if streams.resident else SEGMENT_TOKENS
            self._routed = RoutedTokens(torch.cat(selected), torch.cat(weights), len(experts), segment)

    def _inputs(self, batch: slice) -> tuple[Tensor, Tensor]:
        """Input of gate and up, quantized and reference: (tokens, hidden_size) float32."""
        streams, width = self._streams, self._streams.shape[2]
        inputs = self._norm(streams.load(streams.quantized, batch).float()).reshape(-1, width)
        wanted = self._norm(streams.load(streams.reference, batch).float()).reshape(-1, width)
        return inputs, wanted

    def _moments(self, width: int, residual_rows: int = 0) -> Moments:
        return Moments(width, residual_rows, self.device)

    def _routing(self) -> RoutedTokens:
        assert self._routed is not None
        return self._routed

    def _segment(self, stream: Tensor, segment: slice) -> Tensor:
        """Tokens of a stream on the device that computes, (tokens, hidden_size); no copy if they lie there."""
        return self._streams.load(stream.view(-1, self._streams.shape[2]), segment)

    def _spread_inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs of the experts, quantized and reference, at tokens of the whole layer."""
        if self._spread is None:
            streams = self._streams
            total = streams.shape[0] * streams.shape[1]
            index = torch.arange(0, total, max(1, total // count), device=streams.reference.device)
            self._spread = (
                self._norm(streams.rows(streams.quantized, index)),
                self._norm(streams.rows(streams.reference, index)),
            )
        return self._spread

    def _activations(self, expert: int, inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the expert's down, and what the bf16 model's output has beyond the bf16 weight's on it."""
        plain, coded = self._reference.mlp.experts[expert], self._quantized.mlp.experts[expert]
        with steady_products(len(inputs), self.device):
            active = _activation(coded, inputs)
            return active, (_activation(plain, wanted) - active) @ plain.down_proj.weight.float().T


def _mlp(layer: DecoderLayer, path: str) -> Mlp:
    module = layer.get_submodule(path)
    assert isinstance(module, Mlp)
    return module


def _activation(mlp: Mlp, inputs: Tensor) -> Tensor:
    return mlp.activate(mlp.gate_proj(inputs), mlp.up_proj(inputs))
