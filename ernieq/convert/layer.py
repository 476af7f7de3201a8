"""Quantize one decoder layer: calibrate an input, encode what reads it, replace it, go on to the next input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ernieq.calibrate import (
    ATTENTION_CONTEXT,
    ATTENTION_INPUT,
    EXPERTS_HIDDEN,
    MLP_INPUT,
    AttentionPass,
    MlpPass,
    Moments,
    Streams,
    TokenWeights,
    corrected_weight,
    hidden_of,
    shared_copy,
    shrinkage,
    shrunk_gram,
)
from ernieq.convert.groups import Encoder, Group, LayerReport, Target, full_name, linear_of
from ernieq.convert.recipe import EncodeSettings, Part
from ernieq.convert.snapshots import Mark
from ernieq.convert.unit_store import DamagedUnitError
from ernieq.encode import Batches, EncodingResult, out_of_memory
from ernieq.kernels.precision import float32_products
from ernieq.model import DecoderLayer, ModelConfig

_ATTENTION_INPUTS = tuple(f"self_attn.{name}_proj" for name in "qkv")
_ATTENTION_OUTPUT = "self_attn.o_proj"


class _Inputs(NamedTuple):
    """What all that read one input have in common.

    Attributes:
        corrector: (width, width), by which a weight is multiplied to lead the quantized prefix back.
        gram: (width, width), the Hessian.
    """

    corrector: Tensor
    gram: Tensor


class LayerQuantizer:
    """Quantizes the layers of a model one after the other.

    Args:
        config: the model's configuration.
        settings: of the encoding.
        encoder: encodes the matrices.
        experts: how many experts are worked on at once; one by one unless given.
    """

    def __init__(
        self, config: ModelConfig, settings: EncodeSettings, encoder: Encoder, experts: Batches | None = None
    ) -> None:
        self._config = config
        self._settings = settings
        self._encoder = encoder
        self._expert_batches = experts or Batches(1, "experts")

    def run(
        self,
        begin: Mark,
        reference: DecoderLayer,
        streams: Streams,
        rotary: tuple[Tensor, Tensor],
        on_streams: Callable[[Mark], None] = lambda _: None,
    ) -> LayerReport:
        """Quantize a layer and move both streams behind it.

        Args:
            begin: where the streams are: before the layer, or behind its attention, whose matrices are then
                taken from what was encoded before.
            reference: the layer with its bf16 weights, widened to float32, or narrow (``narrow_layer``) on a
                GPU; routed experts are let go of as soon as they are done.
            streams: hidden states there; afterwards, behind the layer.
            rotary: cosine and sine of all positions of a window.
            on_streams: called when the streams have been moved behind the attention.

        Raises:
            DamagedUnitError: a matrix of an attention that the streams are behind is no longer there.
        """
        index = begin.layer
        self._report = LayerReport(index)
        self._reference = reference
        self._quantized = shared_copy(reference)
        self._worker = streams.device
        with float32_products(streams.device, tensor_cores=False):
            if begin.attended:
                self._attended()
            else:
                self._attention(AttentionPass(reference, self._quantized, streams, rotary))
                on_streams(Mark(index, attended=True))
            mlp = MlpPass(reference, self._quantized, streams)
            inputs = cache(lambda: self._corrected(mlp.input_moments()))
            if self._config.is_moe_layer(index):
                self._moe(mlp, inputs)
            else:
                self._dense(mlp, "mlp", Part.DENSE_MLP, inputs)
                mlp.advance("mlp")
        self._report.output_error = _relative_error(streams)
        return self._report

    def _attention(self, attention: AttentionPass) -> None:
        def inputs() -> Target:
            return self._led_back(names, self._corrected(attention.input_moments()))

        def context() -> Target:
            return self._made_up(output, attention.context_moments())

        names, output = _ATTENTION_INPUTS, _ATTENTION_OUTPUT
        self._encode(names, Part.ATTENTION, ATTENTION_INPUT, inputs)
        self._encode([output], Part.ATTENTION, ATTENTION_CONTEXT, context)
        attention.advance()

    def _attended(self) -> None:
        """Take the matrices of an attention that the streams are behind."""

        def lost(name: str) -> Target:
            raise DamagedUnitError(full_name(self._report.index, name))

        self._encode(_ATTENTION_INPUTS, Part.ATTENTION, ATTENTION_INPUT, lambda: lost(_ATTENTION_INPUTS[0]))
        self._encode([_ATTENTION_OUTPUT], Part.ATTENTION, ATTENTION_CONTEXT, lambda: lost(_ATTENTION_OUTPUT))

    def _dense(self, mlp: MlpPass, path: str, part: Part, inputs: Callable[[], _Inputs]) -> None:
        names = [f"{path}.gate_proj", f"{path}.up_proj"]
        self._encode(names, part, MLP_INPUT, lambda: self._led_back(names, inputs()))
        down = f"{path}.down_proj"
        self._encode([down], part, hidden_of(path), lambda: self._made_up(down, mlp.down_moments(path)))

    def _moe(self, mlp: MlpPass, inputs: Callable[[], _Inputs]) -> None:
        def quantize(experts: Sequence[int]) -> None:
            self._experts(mlp, experts, inputs)

        self._expert_batches.run(range(self._config.moe_num_experts), quantize)
        shared = "mlp.shared_experts" if self._config.moe_num_shared_experts else None
        if shared:
            self._dense(mlp, shared, Part.SHARED_EXPERTS, inputs)
        mlp.advance(shared)

    def _experts(self, mlp: MlpPass, experts: Sequence[int], inputs: Callable[[], _Inputs]) -> None:
        """Quantize a batch of experts; nothing is reported, and no stream moves, before all are encoded."""
        index, paths = self._report.index, [f"mlp.experts.{expert}" for expert in experts]
        names = [[f"{path}.gate_proj", f"{path}.up_proj"] for path in paths]
        first = self._encoder.encode(
            index,
            [self._group(own, Part.ROUTED_EXPERTS, MLP_INPUT) for own in names],
            lambda: [
                self._expert_inputs(own, moments, inputs())
                for own, moments in zip(names, mlp.experts_input_moments(experts), strict=True)
            ],
        )
        self._replace(first)
        downs = [f"{path}.down_proj" for path in paths]
        second = self._encoder.encode(
            index,
            [self._group([down], Part.ROUTED_EXPERTS, EXPERTS_HIDDEN) for down in downs],
            lambda: [
                self._expert_down(down, *moments)
                for down, moments in zip(downs, mlp.experts_down_moments(experts), strict=True)
            ],
        )
        self._replace(second)
        try:
            mlp.add_experts(experts)
        except torch.OutOfMemoryError:  # the streams have begun to move: a smaller batch would move them twice
            raise out_of_memory() from None
        for expert, path in zip(experts, paths, strict=True):
            routed = mlp.expert_weights(expert)
            self._report.expert_tokens.append(routed.tokens)
            self._report.expert_trust.append(float(self._trust(routed, self._config.hidden_size)))
            done = {name: result for name, result in (first | second).items() if name.startswith(f"{path}.")}
            self._report.note(done)
            self._let_go(path)

    def _expert_inputs(self, names: Sequence[str], own: Moments, layer: _Inputs) -> Target:
        gram = shrunk_gram(own, layer.gram, self._settings.shrinkage)
        return Target(self._led_back(names, layer).weights, gram)

    def _expert_down(self, name: str, own: Moments, layer: Moments) -> Target:
        trust = self._trust(own, own.width)
        gram = shrunk_gram(own, layer.mean_gram(), self._settings.shrinkage)
        residual = trust * own.mean_residual() + (1 - trust) * layer.mean_residual()
        weight = corrected_weight(self._weight(name), gram, residual, self._settings.correction_damping)
        return Target({name: weight}, gram)

    def _made_up(self, name: str, moments: Moments) -> Target:
        """A weight that makes up for what the stream lacks, and the Hessian of its input."""
        gram = moments.mean_gram()
        damping = self._settings.correction_damping
        weight = corrected_weight(self._weight(name), gram, moments.mean_residual(), damping)
        return Target({name: weight}, gram)

    def _group(self, names: Sequence[str], part: Part, signs: str) -> Group:
        weights = {name: linear_of(self._reference, name).weight.data for name in names}
        return Group(weights, part, signs, self._worker)

    def _encode(self, names: Sequence[str], part: Part, signs: str, aim: Callable[[], Target]) -> None:
        """Encode a group, report it and put it into the quantized layer."""
        encoded = self._encoder.encode(self._report.index, [self._group(names, part, signs)], lambda: [aim()])
        self._report.note(encoded)
        self._replace(encoded)

    def _replace(self, encoded: Mapping[str, EncodingResult]) -> None:
        for name, result in encoded.items():
            linear_of(self._quantized, name).weight.data = result.decoded

    def _let_go(self, path: str) -> None:
        """Free the weights of an expert that nothing reads any more."""
        for layer in (self._reference, self._quantized):
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = linear_of(layer, f"{path}.{name}").weight
                weight.data = weight.data.new_empty(0)

    def _trust(self, own: TokenWeights, width: int) -> float | Tensor:
        return shrinkage(own.effective_tokens, width, self._settings.shrinkage)

    def _corrected(self, moments: Moments) -> _Inputs:
        """C, with W C the weight that makes the bf16 output of the quantized prefix's input; the Hessian."""
        identity, gram = torch.eye(moments.width, device=moments.gram.device), moments.mean_gram()
        damping = self._settings.correction_damping
        return _Inputs(corrected_weight(identity, gram, moments.mean_residual(), damping), gram)

    def _led_back(self, names: Sequence[str], inputs: _Inputs) -> Target:
        return Target({name: self._weight(name) @ inputs.corrector for name in names}, inputs.gram)

    def _weight(self, name: str) -> Tensor:
        return linear_of(self._reference, name).weight.data.float()


def _relative_error(streams: Streams) -> float:
    error = power = torch.zeros((), dtype=torch.float64, device=streams.device)
    for batch in streams.batches():
        wanted = streams.load(streams.reference, batch).float()
        found = streams.load(streams.quantized, batch).float()
        error = error + _total((found - wanted).square())
        power = power + _total(wanted.square())
    return float(error / power) if power > 0 else 0.0


def _total(terms: Tensor) -> Tensor:
    """Sum over the last axis first: threads share out tokens, where they would cut a single sum into parts."""
    total: Tensor = terms.sum(dim=-1, dtype=torch.float64).sum()
    return total
