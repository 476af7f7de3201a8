"""Names, shapes and roles against the written checkpoint and against the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ernieq.model import (
    ErnieForCausalLM,
    ModelConfig,
    ParameterRole,
    expected_parameters,
    layer_parameters,
)
from tests.model.test_parity import VARIANTS
from tests.tiny import TinyOptions, tiny_config, tiny_tensors


def config_of(options: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(TinyOptions(**options)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_expected_parameters_are_those_of_a_written_checkpoint(variant: str) -> None:
    tensors = tiny_tensors(TinyOptions(**VARIANTS[variant]))
    written = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".mtp_" not in name}
    expected = expected_parameters(config_of(VARIANTS[variant]))
    assert {name: spec.shape for name, spec in expected.items()} == written


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_dict_has_exactly_the_expected_names_and_shapes(variant: str) -> None:
    config = config_of(VARIANTS[variant])
    with torch.device("meta"):
        state = ErnieForCausalLM(config).state_dict()
    expected = expected_parameters(config)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: spec.shape for name, spec in expected.items()
    }


def test_layer_parameters_are_the_expected_ones_of_that_layer() -> None:
    config = config_of({"layers": 12, "interval": 2})
    expected = expected_parameters(config)
    for index in (0, 1, 10):
        wanted = {name for name in expected if name.startswith(f"model.layers.{index}.")}
        assert set(layer_parameters(config, index)) == wanted


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", ParameterRole.EMBEDDING),
        ("lm_head.weight", ParameterRole.HEAD),
        ("lm_head.bias", ParameterRole.BIAS),
        ("model.norm.weight", ParameterRole.NORM),
        ("model.layers.0.mlp.up_proj.weight", ParameterRole.DENSE_MLP),
        ("model.layers.0.mlp.up_proj.bias", ParameterRole.BIAS),
        ("model.layers.1.self_attn.k_proj.weight", ParameterRole.ATTENTION),
        ("model.layers.1.mlp.gate.weight", ParameterRole.ROUTER),
        ("model.layers.1.mlp.moe_statics.e_score_correction_bias", ParameterRole.ROUTER_BIAS),
        ("model.layers.1.mlp.experts.3.down_proj.weight", ParameterRole.ROUTED_EXPERT),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", ParameterRole.SHARED_EXPERT),
        ("model.layers.1.post_attention_layernorm.weight", ParameterRole.NORM),
    ],
)
def test_roles_follow_the_names(name: str, role: ParameterRole) -> None:
    assert expected_parameters(config_of({"use_bias": True, "tied": False}))[name].role is role


def test_a_tied_head_shares_the_embedding_after_every_way_of_loading() -> None:
    config = config_of({})
    state = {
        name: torch.full(spec.shape, 0.5, dtype=torch.float32)
        for name, spec in expected_parameters(config).items()
    }
    for assign in (False, True):
        model = ErnieForCausalLM(config)
        assert model.load_state_dict(state, assign=assign) == ([], [])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.state_dict()["model.embed_tokens.weight"], state["model.embed_tokens.weight"])


def test_an_untied_head_that_is_missing_is_reported() -> None:
    config = config_of({"tied": False})
    state = {name: torch.zeros(spec.shape) for name, spec in expected_parameters(config).items()}
    del state["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        ErnieForCausalLM(config).load_state_dict(state, assign=True)
