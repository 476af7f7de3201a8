"""Quantize one decoder layer: calibrate an input, encode what reads it, replace it, go on to the next input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    corrected_weight,
    hidden_of,
    shared_copy,
    shrinkage,
    shrunk_gram,
)
from ernieq.convert.groups import Group, GroupEncoder, LayerReport, linear_of
from ernieq.convert.recipe import Part, Recipe
from ernieq.convert.unit_store import Units
from ernieq.encode import Batches, EncodeOptions, EncodingResult, out_of_memory
from ernieq.kernels.precision import float32_products
from ernieq.model import DecoderLayer, ModelConfig


class LayerQuantizer:
    """Quantizes the layers of a model one after the other.

    Args:
        config: the model's configuration.
        recipe: bits and settings.
        options: how matrices are encoded.
        units: has what was encoded before, and receives what is encoded now.
        on_weights: called with the number of weights encoded since the last call.
        experts: how many experts are worked on at once; one by one unless given.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        options: EncodeOptions,
        units: Units,
        on_weights: Callable[[int], None] | None = None,
        experts: Batches | None = None,
    ) -> None:
        self._config = config
        self._recipe = recipe
        self._encoder = GroupEncoder(recipe, options, units, on_weights)
        self._expert_batches = experts or Batches(1, "experts", options.on_notice)

    def run(
        self, index: int, reference: DecoderLayer, streams: Streams, rotary: tuple[Tensor, Tensor]
    ) -> LayerReport:
        """Quantize a layer and move both streams behind it.

        Args:
            index: number of the layer.
            reference: the layer with its bf16 weights, widened to float32, or narrow (``narrow_layer``) on a
                GPU; routed experts are let go of as soon as they are done.
            streams: hidden states before the layer; afterwards, behind it.
            rotary: cosine and sine of all positions of a window.
        """
        self._report = LayerReport(index)
        self._reference = reference
        self._quantized = shared_copy(reference)
        with float32_products(streams.device, tensor_cores=False):
            self._attention(AttentionPass(reference, self._quantized, streams, rotary))
            mlp = MlpPass(reference, self._quantized, streams)
            if self._config.is_moe_layer(index):
                self._moe(mlp)
            else:
                self._dense(mlp, "mlp", Part.DENSE_MLP, mlp.input_moments())
                mlp.advance("mlp")
        self._report.output_error = _relative_error(streams)
        return self._report

    def _attention(self, attention: AttentionPass) -> None:
        moments = attention.input_moments()
        weights = self._led_back([f"self_attn.{name}_proj" for name in "qkv"], self._corrector(moments))
        self._encode(Group(weights, Part.ATTENTION, ATTENTION_INPUT, moments.mean_gram()))
        del moments
        moments = attention.context_moments()
        self._encode_corrected("self_attn.o_proj", Part.ATTENTION, ATTENTION_CONTEXT, moments)
        attention.advance()

    def _dense(self, mlp: MlpPass, path: str, part: Part, inputs: Moments) -> None:
        weights = self._led_back([f"{path}.gate_proj", f"{path}.up_proj"], self._corrector(inputs))
        self._encode(Group(weights, part, MLP_INPUT, inputs.mean_gram()))
        del weights
        self._encode_corrected(f"{path}.down_proj", part, hidden_of(path), mlp.down_moments(path))

    def _moe(self, mlp: MlpPass) -> None:
        inputs = mlp.input_moments()
        corrector, prior = self._corrector(inputs), inputs.mean_gram()

        def quantize(experts: Sequence[int]) -> None:
            self._experts(mlp, experts, corrector, prior)

        self._expert_batches.run(range(self._config.moe_num_experts), quantize)
        shared = "mlp.shared_experts" if self._config.moe_num_shared_experts else None
        if shared:
            self._dense(mlp, shared, Part.SHARED_EXPERTS, inputs)
        mlp.advance(shared)

    def _experts(self, mlp: MlpPass, experts: Sequence[int], corrector: Tensor, prior: Tensor) -> None:
        """Quantize a batch of experts; nothing is reported, and no stream moves, before all are encoded."""
        own = mlp.experts_input_moments(experts)
        tokens = [moments.tokens for moments in own]
        trust = [float(self._trust(moments)) for moments in own]
        first = self._encoder.encode(
            self._report.index,
            [
                self._expert_inputs(expert, moments, corrector, prior)
                for expert, moments in zip(experts, own, strict=True)
            ],
        )
        del own
        self._replace(first)
        second = self._encoder.encode(
            self._report.index,
            [
                self._expert_down(expert, *moments)
                for expert, moments in zip(experts, mlp.experts_down_moments(experts), strict=True)
            ],
        )
        self._replace(second)
        try:
            mlp.add_experts(experts)
        except torch.OutOfMemoryError:  # the streams have begun to move: a smaller batch would move them twice
            raise out_of_memory() from None
        self._report.expert_tokens += tokens
        self._report.expert_trust += trust
        for expert in experts:
            path = f"mlp.experts.{expert}."
            done = {name: result for name, result in (first | second).items() if name.startswith(path)}
            self._report.note(done)
            self._let_go(path)

    def _expert_inputs(self, expert: int, own: Moments, corrector: Tensor, prior: Tensor) -> Group:
        path = f"mlp.experts.{expert}"
        weights = self._led_back([f"{path}.gate_proj", f"{path}.up_proj"], corrector)
        gram = shrunk_gram(own, prior, self._recipe.encode.shrinkage)
        return Group(weights, Part.ROUTED_EXPERTS, MLP_INPUT, gram)

    def _expert_down(self, expert: int, own: Moments, layer: Moments) -> Group:
        name, trust = f"mlp.experts.{expert}.down_proj", self._trust(own)
        gram = shrunk_gram(own, layer.mean_gram(), self._recipe.encode.shrinkage)
        residual = trust * own.mean_residual() + (1 - trust) * layer.mean_residual()
        weight = corrected_weight(self._weight(name), gram, residual, self._recipe.encode.correction_damping)
        return Group({name: weight}, Part.ROUTED_EXPERTS, EXPERTS_HIDDEN, gram)

    def _encode_corrected(self, name: str, part: Part, signs: str, moments: Moments) -> None:
        gram = moments.mean_gram()
        damping = self._recipe.encode.correction_damping
        weight = corrected_weight(self._weight(name), gram, moments.mean_residual(), damping)
        self._encode(Group({name: weight}, part, signs, gram))

    def _encode(self, group: Group) -> None:
        """Encode a group, report it and put it into the quantized layer."""
        encoded = self._encoder.encode(self._report.index, [group])
        self._report.note(encoded)
        self._replace(encoded)

    def _replace(self, encoded: Mapping[str, EncodingResult]) -> None:
        for name, result in encoded.items():
            linear_of(self._quantized, name).weight.data = result.decoded

    def _let_go(self, path: str) -> None:
        """Free the weights of an expert that nothing reads any more."""
        for layer in (self._reference, self._quantized):
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = linear_of(layer, path + name).weight
                weight.data = weight.data.new_empty(0)

    def _trust(self, own: Moments) -> float | Tensor:
        return shrinkage(own.effective_tokens, own.width, self._recipe.encode.shrinkage)

    def _corrector(self, moments: Moments) -> Tensor:
        """C with W C the weight that makes the bf16 output from the quantized prefix's input."""
        identity = torch.eye(moments.width, device=moments.gram.device)
        damping = self._recipe.encode.correction_damping
        return corrected_weight(identity, moments.mean_gram(), moments.mean_residual(), damping)

    def _led_back(self, names: Sequence[str], corrector: Tensor) -> dict[str, Tensor]:
        return {name: self._weight(name) @ corrector for name in names}

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
