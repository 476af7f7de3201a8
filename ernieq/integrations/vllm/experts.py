"""The routed experts of a layer, packed, in place of vLLM's dense ones.

On the CPU this method also chooses the experts, from the router's logits: vLLM's own CPU router leaves out the
correction bias of ERNIE 4.5 (docs/vllm.md), and sends tokens to other experts than the model was trained with.
On a GPU vLLM's router is right, and is used.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from ernieq.errors import UnsupportedModelError
from ernieq.integrations.vllm.expert_storage import ExpertStorage
from ernieq.integrations.vllm.experts_operator import packed_experts
from ernieq.integrations.vllm.geometry import part_numbers
from ernieq.model.mlp import choose_experts
from ernieq.pack import ModuleSpec

_PREFIXES = ("w13", "w2")


class ErnieqExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Runs the experts that each token selected.

    Args:
        moe: vLLM's description of the layer.
        name: ``model.layers.3.mlp.experts``.
        specs: the code of gate and up, and that of down.
        norm_min: least sum that routing weights are divided by.
    """

    def __init__(self, moe: Any, name: str, specs: tuple[ModuleSpec, ModuleSpec], norm_min: float) -> None:
        super().__init__(moe)
        self._name = name
        self._specs = specs
        self._norm_min = norm_min

    @property
    def is_monolithic(self) -> bool:
        """Whether this method routes, too."""
        return bool(current_platform.is_cpu())

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the experts, or slices of them, that this process holds.

        Raises:
            UsageError: they can't be cut for so many processes.
            UnsupportedModelError: vLLM asks for an activation, padding or bias that ERNIE 4.5 has not.
        """
        del params_dtype, intermediate_size_per_partition, extra_weight_attrs
        moe = self.moe
        if moe.activation.value != "silu" or moe.has_bias or hidden_size != moe.hidden_dim_unpadded:
            raise UnsupportedModelError(
                f"{self._name} is not an ERNIE 4.5 layer of experts (silu, no biases, no padded hidden width)"
            )
        storage = ExpertStorage(
            self._name, self._specs, num_experts, hidden_size, moe.intermediate_size, moe.tp_rank, moe.tp_size
        )
        layer.packed_storage = storage
        layer.packed_numbers = part_numbers([storage.gate_up, storage.down])
        for name, tensor in storage.new_tensors().items():
            parameter = nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = partial(_load, layer, storage, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded and put it in the order of the kernels."""
        storage: ExpertStorage = layer.packed_storage
        for prefix in _PREFIXES:
            names = [f"{prefix}_{suffix}" for suffix in ("weight_packed", "weight_scale", "weight_signs")]
            finished = storage.finish(prefix, *(getattr(layer, name).data for name in names))
            for name, tensor in zip(names, finished, strict=True):
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels take no part."""
        del layer

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """(N, H) to (N, H), with vLLM's routing: weights and numbers of the experts, (N, k)."""
        del shared_experts, shared_experts_input  # vLLM runs them itself
        return self._run(layer, x, topk_weights, topk_ids)

    def apply_monolithic(
        self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        """(N, H) to (N, H), from the router's logits, (N, E)."""
        del input_ids
        bias = layer.e_score_correction_bias
        logits = router_logits.float()
        bias = torch.zeros_like(logits[:1]) if bias is None else bias.float()
        routing = choose_experts(logits, bias, layer.top_k, self._norm_min)
        return self._run(layer, x, routing.weights, routing.selected)

    def _run(self, layer: Any, x: Tensor, weights: Tensor, selected: Tensor) -> Tensor:
        expert_map = layer.expert_map
        if expert_map is not None:  # expert parallelism: others hold the experts that it gives -1
            selected = expert_map[selected.long()]
            weights = weights.masked_fill(selected < 0, 0)
            selected = selected.clamp(min=0)
        out: Tensor = packed_experts(
            x,
            weights,
            selected,
            [layer.w13_weight_packed, layer.w13_weight_scale, layer.w13_weight_signs],
            [layer.w2_weight_packed, layer.w2_weight_scale, layer.w2_weight_signs],
            layer.packed_numbers,
            (self.moe.max_capture_size or 0) * layer.top_k,
        )
        return out


def _load(
    layer: Any,
    storage: ExpertStorage,
    name: str,
    param: nn.Parameter,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Called by vLLM for one matrix of one expert; ``shard_id`` is w1 (gate), w3 (up) or w2 (down)."""
    del weight_name
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local >= 0:
        storage.place(name, param.data, local, shard_id, loaded_weight)
    return local >= 0 if return_success else None
