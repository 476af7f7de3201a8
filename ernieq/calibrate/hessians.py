"""Hessians of the unquantized model, collected once and kept in files: what ``ernieq calibrate`` writes.

One safetensors file a layer holds a (width, width) float32 mean of x x^T for every input that projections read,
under the name of that input within the layer; ``calibration.json`` says where they come from. Quantizing from
them is quick and needs no text, but does not see, or correct, the errors of the layers quantized before.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ernieq.calibrate.attention import AttentionPass
from ernieq.calibrate.mlp import MlpPass
from ernieq.calibrate.moments import shrinkage, shrunk_gram
from ernieq.calibrate.streams import Streams
from ernieq.model import DecoderLayer, ModelConfig

ATTENTION_INPUT = "self_attn.input"
ATTENTION_CONTEXT = "self_attn.context"
MLP_INPUT = "mlp.input"
EXPERTS_HIDDEN = "mlp.experts.hidden"


def hidden_of(path: str) -> str:
    """Name of the input of the down projection of a dense or shared feed-forward part."""
    return f"{path}.hidden"


@dataclass
class LayerStatistics:
    """What one layer's inputs look like.

    Args:
        grams: input name -> (width, width) float32; experts have names of their own, already shrunk.
        expert_tokens: calibration tokens routed to every expert.
        expert_trust: weight of every expert's own Hessian against its layer's, 0 to 1.
    """

    grams: dict[str, Tensor]
    expert_tokens: list[int]
    expert_trust: list[float]


def collect_layer(
    config: ModelConfig,
    index: int,
    layer: DecoderLayer,
    streams: Streams,
    rotary: tuple[Tensor, Tensor],
    shrinkage_strength: float,
) -> LayerStatistics:
    """Run one unquantized layer over the sample and collect the Hessian of every input.

    Args:
        config: the model's configuration.
        index: number of the layer.
        layer: the layer, widened to float32.
        streams: hidden states before the layer, the same in both streams; afterwards, behind it.
        rotary: cosine and sine of all positions of a window.
        shrinkage_strength: tokens per channel at which an expert's own Hessian counts as much as its layer's.
    """
    attention = AttentionPass(layer, layer, streams, rotary)
    statistics = LayerStatistics({ATTENTION_INPUT: attention.input_moments().mean_gram()}, [], [])
    statistics.grams[ATTENTION_CONTEXT] = attention.context_moments().mean_gram()
    attention.advance()
    mlp = MlpPass(layer, layer, streams)
    inputs = mlp.input_moments()
    statistics.grams[MLP_INPUT] = inputs.mean_gram()
    path: str | None = "mlp"
    if config.is_moe_layer(index):
        path = "mlp.shared_experts" if config.moe_num_shared_experts else None
        for expert in range(config.moe_num_experts):
            own = mlp.expert_input_moments(expert)
            statistics.expert_tokens.append(own.tokens)
            statistics.expert_trust.append(shrinkage(own.effective_tokens, own.width, shrinkage_strength))
            gram = shrunk_gram(own, inputs.mean_gram(), shrinkage_strength)
            statistics.grams[f"mlp.experts.{expert}.input"] = gram
            down, prior = mlp.expert_down_moments(expert)
            gram = shrunk_gram(down, prior.mean_gram(), shrinkage_strength)
            statistics.grams[f"mlp.experts.{expert}.hidden"] = gram
            mlp.add_expert(expert)
    if path is not None:
        statistics.grams[hidden_of(path)] = mlp.down_moments(path).mean_gram()
    mlp.advance(path)
    return statistics
