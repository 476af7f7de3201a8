"""Quantize one decoder layer: calibrate an input, encode what reads it, replace it, go on to the next input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

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
    shrinkage,
    shrunk_gram,
)
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.encode import EncodeOptions, EncodingResult, encode_matrices, input_signs
from ernieq.model import DecoderLayer, ModelConfig
from ernieq.trellis import EncodedMatrix, TrellisCode


class Sink(Protocol):
    """Where encoded matrices go: the writer of the packed checkpoint, or a test's dictionary."""

    def add_encoded(self, module_name: str, matrix: EncodedMatrix) -> None:
        """Take one encoded matrix."""
        ...


@dataclass
class LayerReport:
    """What happened in one layer.

    Args:
        index: number of the layer.
        errors: proxy error of every encoded matrix, by its name within the layer.
        expert_tokens: calibration tokens routed to every expert.
        expert_trust: weight of every expert's own Hessian against its layer's, 0 to 1.
        output_error: squared error of the layer's output against the bf16 model, relative to its power.
    """

    index: int
    errors: dict[str, float] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    expert_trust: list[float] = field(default_factory=list)
    output_error: float = 0.0


class LayerQuantizer:
    """Quantizes the layers of a model one after the other.

    Args:
        config: the model's configuration.
        recipe: bits and settings.
        options: how matrices are encoded.
        sink: receives the encoded matrices.
        on_weights: called with the number of weights encoded since the last call.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        options: EncodeOptions,
        sink: Sink,
        on_weights: Callable[[int], None] | None = None,
    ) -> None:
        self._config = config
        self._recipe = recipe
        self._options = options
        self._sink = sink
        self._on_weights = on_weights

    def run(
        self, index: int, reference: DecoderLayer, streams: Streams, rotary: tuple[Tensor, Tensor]
    ) -> LayerReport:
        """Quantize a layer and move both streams behind it.

        Args:
            index: number of the layer.
            reference: the layer with its bf16 weights, widened to float32.
            streams: hidden states before the layer; afterwards, behind it.
            rotary: cosine and sine of all positions of a window.
        """
        self._report = LayerReport(index)
        self._reference = reference
        self._quantized = copy.deepcopy(reference)
        self._attention(AttentionPass(reference, self._quantized, streams, rotary))
        mlp = MlpPass(reference, self._quantized, streams)
        if self._config.is_moe_layer(index):
            self._experts(mlp)
        else:
            self._dense(mlp, "mlp", Part.DENSE_MLP, mlp.input_moments())
            mlp.advance("mlp")
        self._report.output_error = _relative_error(streams)
        return self._report

    def _attention(self, attention: AttentionPass) -> None:
        moments = attention.input_moments()
        names = [f"self_attn.{name}_proj" for name in "qkv"]
        self._encode(names, Part.ATTENTION, ATTENTION_INPUT, moments.mean_gram(), self._corrector(moments))
        moments = attention.context_moments()
        self._encode_corrected("self_attn.o_proj", Part.ATTENTION, ATTENTION_CONTEXT, moments)
        attention.advance()

    def _dense(self, mlp: MlpPass, path: str, part: Part, inputs: Moments) -> None:
        names = [f"{path}.gate_proj", f"{path}.up_proj"]
        self._encode(names, part, MLP_INPUT, inputs.mean_gram(), self._corrector(inputs))
        self._encode_corrected(f"{path}.down_proj", part, hidden_of(path), mlp.down_moments(path))

    def _experts(self, mlp: MlpPass) -> None:
        inputs = mlp.input_moments()
        corrector, prior = self._corrector(inputs), inputs.mean_gram()
        strength = self._recipe.encode.shrinkage
        for expert in range(self._config.moe_num_experts):
            path = f"mlp.experts.{expert}"
            own = mlp.expert_input_moments(expert)
            self._report.expert_tokens.append(own.tokens)
            self._report.expert_trust.append(shrinkage(own.effective_tokens, own.width, strength))
            names = [f"{path}.gate_proj", f"{path}.up_proj"]
            gram = shrunk_gram(own, prior, strength)
            self._encode(names, Part.ROUTED_EXPERTS, MLP_INPUT, gram, corrector)
            down, layer = mlp.expert_down_moments(expert)
            self._encode_expert_down(f"{path}.down_proj", down, layer)
            mlp.add_expert(expert)
        shared = "mlp.shared_experts" if self._config.moe_num_shared_experts else None
        if shared:
            self._dense(mlp, shared, Part.SHARED_EXPERTS, inputs)
        mlp.advance(shared)

    def _encode_expert_down(self, name: str, own: Moments, layer: Moments) -> None:
        strength = self._recipe.encode.shrinkage
        trust = shrinkage(own.effective_tokens, own.width, strength)
        gram = shrunk_gram(own, layer.mean_gram(), strength)
        residual = trust * own.mean_residual() + (1 - trust) * layer.mean_residual()
        weight = corrected_weight(self._weight(name), gram, residual, self._recipe.encode.correction_damping)
        self._encode([name], Part.ROUTED_EXPERTS, EXPERTS_HIDDEN, gram, None, {name: weight})

    def _encode_corrected(self, name: str, part: Part, group: str, moments: Moments) -> None:
        gram = moments.mean_gram()
        damping = self._recipe.encode.correction_damping
        weight = corrected_weight(self._weight(name), gram, moments.mean_residual(), damping)
        self._encode([name], part, group, gram, None, {name: weight})

    def _corrector(self, moments: Moments) -> Tensor:
        """C with W C the weight that makes the bf16 output from the quantized prefix's input."""
        identity = torch.eye(moments.width)
        damping = self._recipe.encode.correction_damping
        return corrected_weight(identity, moments.mean_gram(), moments.mean_residual(), damping)

    def _encode(
        self,
        names: list[str],
        part: Part,
        group: str,
        gram: Tensor,
        corrector: Tensor | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Encode the matrices of a group that the recipe quantizes, and put them into the quantized layer."""
        if weights is None:
            weights = {
                name: self._weight(name) if corrector is None else self._weight(name) @ corrector
                for name in names
            }
        chosen = {name: weights[name] for name in names}
        for name, result in encode_group(
            self._report, chosen, part, group, gram, self._recipe, self._options, self._sink, self._on_weights
        ).items():
            linear_of(self._quantized, name).weight.data = result.decoded

    def _weight(self, name: str) -> Tensor:
        return linear_of(self._reference, name).weight.data


def encode_group(
    report: LayerReport,
    weights: Mapping[str, Tensor],
    part: Part,
    group: str,
    gram: Tensor,
    recipe: Recipe,
    options: EncodeOptions,
    sink: Sink,
    on_weights: Callable[[int], None] | None,
) -> dict[str, EncodingResult]:
    """Encode the matrices that read one input, those of equal bits together, and hand them to the sink.

    Args:
        report: of the layer; receives the proxy errors.
        weights: name within the layer -> (out_features, in_features) float32.
        part: part of the model that the matrices belong to.
        group: name of their input within the layer, which decides the signs of the rotation.
        gram: (in_features, in_features) float32, mean of x x^T.
        recipe: bits and seed.
        options: how matrices are encoded.
        sink: receives the encoded matrices.
        on_weights: called with the number of weights encoded since the last call.

    Returns:
        Name -> result, without the matrices that the recipe keeps.
    """
    prefix = f"model.layers.{report.index}."
    by_bits: dict[int, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        bits = recipe.bits_of(prefix + name, part)
        if bits != KEEP:
            by_bits.setdefault(bits, {})[name] = weight
    signs = input_signs(recipe.seed, prefix + group, gram.shape[0])
    encoded: dict[str, EncodingResult] = {}
    for bits, alike in by_bits.items():
        code = TrellisCode(bits, recipe.encode.state_bits)
        encoded |= encode_matrices(alike, gram, signs, code, options, on_weights)
    for name, result in encoded.items():
        sink.add_encoded(prefix + name, result.encoded)
        report.errors[name] = result.proxy_error
    return encoded


def linear_of(layer: DecoderLayer, name: str) -> nn.Linear:
    """The plain linear of that name within a layer."""
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _relative_error(streams: Streams) -> float:
    error = power = 0.0
    for batch in streams.batches():
        wanted = streams.reference[batch].float()
        error += float((streams.quantized[batch].float() - wanted).square().sum(dtype=torch.float64))
        power += float(wanted.square().sum(dtype=torch.float64))
    return error / power if power > 0 else 0.0
