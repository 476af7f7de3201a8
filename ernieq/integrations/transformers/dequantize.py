"""From a packed model back to transformers' own modules, with the weights that the codes stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeExperts

from ernieq.decode import TrellisWeight
from ernieq.integrations.transformers.modules import PackedEmbedding, PackedExperts, PackedHead, PackedLinear
from ernieq.model import Mlp

_ROUTER = ".mlp.gate."  # stays float32, as transformers keeps it


def dequantize_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Decode every packed matrix of a model, one after the other.

    On the CPU weights are rounded to ``dtype`` from the same float32 numbers as by ``ernieq export``. On a GPU
    the rotation adds in another order, and a few weights become the neighbouring number.

    Args:
        model: a loaded model; it is changed.
        dtype: of all weights but the router's.
    """
    for name, parameter in model.named_parameters():
        if _ROUTER not in name:
            parameter.data = parameter.data.to(dtype)
    for name, module in list(model.named_modules()):
        plain: nn.Module
        if isinstance(module, PackedExperts):
            plain = _fused(module, model, dtype)
        elif isinstance(module, PackedLinear):
            plain = _linear(_decoded(module.trellis, dtype), module.bias)
        elif isinstance(module, PackedEmbedding):
            plain = nn.Embedding.from_pretrained(
                _decoded(module.trellis, dtype), padding_idx=model.config.pad_token_id
            )
        elif isinstance(module, PackedHead):
            # The embedding comes before the head in a model, so it is plain by now, and its table is shared.
            table = model.get_input_embeddings()
            assert isinstance(table, nn.Embedding)
            plain = _linear(table.weight, module.bias)
        else:
            continue
        model.set_submodule(name, plain)
    model.requires_grad_(True)
    model.config.dtype = dtype


def _decoded(weight: nn.Module, dtype: torch.dtype) -> Tensor:
    """(out_features, in_features): a packed matrix decoded, or the weight of a plain linear."""
    if isinstance(weight, TrellisWeight):
        return weight.decode_rows().to(dtype)
    plain = weight.weight
    assert isinstance(plain, Tensor)
    return plain.to(dtype)


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    linear.register_parameter("bias", bias)
    return linear


def _fused(module: PackedExperts, model: PreTrainedModel, dtype: torch.dtype) -> Ernie4_5_MoeExperts:
    """Experts as transformers holds them: (E, 2 I, H) with gate above up, and (E, H, I)."""
    with torch.device("meta"):
        fused = Ernie4_5_MoeExperts(model.config)  # type: ignore[no-untyped-call]
    device = next(iter(module.trellis.state_dict().values())).device
    gate_up = torch.empty(fused.gate_up_proj.shape, dtype=dtype, device=device)
    down = torch.empty(fused.down_proj.shape, dtype=dtype, device=device)
    for number, mlp in enumerate(module.trellis):
        assert isinstance(mlp, Mlp)
        gate_up[number] = torch.cat([_decoded(mlp.gate_proj, dtype), _decoded(mlp.up_proj, dtype)])
        down[number] = _decoded(mlp.down_proj, dtype)
    fused.gate_up_proj, fused.down_proj = nn.Parameter(gate_up), nn.Parameter(down)
    return fused
