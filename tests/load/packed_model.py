"""Writes packed checkpoints of random bytes, and the plain weights that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ernieq.model import ErnieForCausalLM, ModelConfig, ParameterRole, ParameterSpec, expected_parameters
from ernieq.pack import Manifest, PackedWriter, RawTensor, Source
from tests.decode.encoded_matrices import plain_weight, random_matrix, random_signs

_LINEARS = {
    ParameterRole.ROUTED_EXPERT,
    ParameterRole.SHARED_EXPERT,
    ParameterRole.ATTENTION,
    ParameterRole.DENSE_MLP,
    ParameterRole.HEAD,
}
EVERYTHING = _LINEARS | {ParameterRole.EMBEDDING}
CARRIED = "model.mtp_block.weight"

MOE = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=48,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=1,
)
DENSE = dataclasses.replace(MOE, model_type="ernie4_5", moe_num_experts=0, moe_num_shared_experts=0)

Chosen = Callable[[str, ParameterSpec], bool]


def by_role(roles: set[ParameterRole]) -> Chosen:
    return lambda _name, spec: spec.role in roles


def raw_config(config: ModelConfig) -> dict[str, object]:
    raw = dataclasses.asdict(config)
    raw["architectures"] = [
        "Ernie4_5_MoeForCausalLM" if config.model_type == "ernie4_5_moe" else "Ernie4_5ForCausalLM"
    ]
    raw["eos_token_id"] = raw.pop("eos_token_ids")[0]
    return raw


def bits_of(name: str) -> int:
    """Some bits for a tensor: they differ within a layer."""
    return 2 + sum(name.encode()) % 5


def plain_tensor(name: str, spec: ParameterSpec) -> Tensor:
    """A weight that is not quantized: bf16 but for the router."""
    random = torch.Generator().manual_seed(sum(name.encode()))
    tensor: Tensor = torch.randn(spec.shape, generator=random)
    if spec.role in (ParameterRole.ROUTER, ParameterRole.ROUTER_BIAS):
        return tensor.mul_(0.2)
    if spec.role is ParameterRole.NORM:
        return tensor.mul_(0.1).add_(1).bfloat16()
    return tensor.div_(spec.shape[-1] ** 0.5).bfloat16()


def as_raw(tensor: Tensor) -> RawTensor:
    dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
    return RawTensor(dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def write_model(
    target: Path,
    config: ModelConfig,
    chosen: Chosen,
    *,
    leave_out: str | None = None,
    extra: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Write a packed checkpoint.

    Args:
        target: directory to make.
        config: the model.
        chosen: which tensors are quantized.
        leave_out: a tensor that is forgotten.
        extra: tensors that are stored as kept though the model has none of the name.

    Returns:
        The weights that it stands for, by name, float32.
    """
    weights = {}
    with PackedWriter(target) as writer:
        for name, spec in expected_parameters(config).items():
            if name == leave_out:
                continue
            if chosen(name, spec):
                rows, columns = spec.shape
                matrix = random_matrix(
                    rows, columns, bits_of(name), signs=random_signs(columns), seed=sum(name.encode())
                )
                writer.add_encoded(name.removesuffix(".weight"), matrix)
                weights[name] = plain_weight(matrix)
            else:
                tensor = plain_tensor(name, spec)
                writer.add_tensor(name, as_raw(tensor))
                weights[name] = tensor.float()
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, as_raw(tensor))
        writer.add_tensor(CARRIED, as_raw(torch.ones(3)), carried=True)
        writer.finish(raw_config(config), Manifest("0.1.0", Source("org/base"), {}, seed=0))
    return weights


def plain_model(config: ModelConfig, weights: dict[str, Tensor]) -> ErnieForCausalLM:
    model = ErnieForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()
