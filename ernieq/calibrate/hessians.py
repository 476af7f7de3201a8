"""Hessians of the unquantized model, collected once and kept in files: what ``ernieq calibrate`` writes.

One safetensors file a layer holds a (width, width) float32 mean of x x^T for every input that projections read,
under the name of that input within the layer; ``calibration.json`` says where they come from. Quantizing from
them is quick and needs no text, but does not see, or correct, the errors of the layers quantized before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

ExpertWork = Callable[[Sequence[int]], None]


def one_by_one(experts: Sequence[int], work: ExpertWork) -> None:
    """Work on one expert after the other."""
    for expert in experts:
        work([expert])


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
    run_experts: Callable[[Sequence[int], ExpertWork], None] = one_by_one,
) -> LayerStatistics:
    """Run one unquantized layer over the sample and collect the Hessian of every input.

    Args:
        config: the model's configuration.
        index: number of the layer.
        layer: the layer, widened to float32, or narrow (``narrow_layer``) on a GPU.
        streams: hidden states before the layer, the same in both streams; afterwards, behind it.
        rotary: cosine and sine of all positions of a window.
        shrinkage_strength: tokens per channel at which an expert's own Hessian counts as much as its layer's.
        run_experts: calls its second argument with batches of the experts, one by one unless given.

    Returns:
        Statistics in the processor's memory.
    """
    attention = AttentionPass(layer, layer, streams, rotary)
    statistics = LayerStatistics({ATTENTION_INPUT: attention.input_moments().mean_gram().cpu()}, [], [])
    statistics.grams[ATTENTION_CONTEXT] = attention.context_moments().mean_gram().cpu()
    attention.advance()
    mlp = MlpPass(layer, layer, streams)
    inputs = mlp.input_moments().mean_gram()
    statistics.grams[MLP_INPUT] = inputs.cpu()
    path: str | None = "mlp"
    if config.is_moe_layer(index):
        path = "mlp.shared_experts" if config.moe_num_shared_experts else None

        def collect(experts: Sequence[int]) -> None:
            _collect_experts(mlp, experts, inputs, shrinkage_strength, statistics)

        run_experts(range(config.moe_num_experts), collect)
    if path is not None:
        statistics.grams[hidden_of(path)] = mlp.down_moments(path).mean_gram().cpu()
    mlp.advance(path)
    return statistics


def _collect_experts(
    mlp: MlpPass, experts: Sequence[int], layer: Tensor, strength: float, statistics: LayerStatistics
) -> None:
    """Collect a batch of experts; nothing is noted before all of them are done."""
    own = mlp.experts_input_moments(experts)
    inputs = [shrunk_gram(moments, layer, strength).cpu() for moments in own]
    trust = [float(shrinkage(moments.effective_tokens, moments.width, strength)) for moments in own]
    tokens = [moments.tokens for moments in own]
    del own
    hidden = [
        shrunk_gram(moments, prior.mean_gram(), strength).cpu()
        for moments, prior in mlp.experts_down_moments(experts)
    ]
    mlp.add_experts(experts)
    statistics.expert_tokens += tokens
    statistics.expert_trust += trust
    for place, expert in enumerate(experts):
        statistics.grams[f"mlp.experts.{expert}.input"] = inputs[place]
        statistics.grams[f"mlp.experts.{expert}.hidden"] = hidden[place]
