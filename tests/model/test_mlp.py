"""The router and the experts, against their definition written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernieq.model import DecoderLayer, ModelConfig, Routing, SparseMlp
from tests.tiny import TinyOptions, tiny_config

OPTIONS = TinyOptions(experts=8, chosen=3)
CONFIG = ModelConfig.from_dict(tiny_config(OPTIONS))


def sparse_mlp(bias: Tensor | None = None) -> SparseMlp:
    torch.manual_seed(0)
    mlp = SparseMlp(CONFIG).requires_grad_(False)
    mlp.gate.weight.normal_(std=0.2)
    if bias is not None:
        mlp.moe_statics.e_score_correction_bias.copy_(bias)
    return mlp


def some_states(count: int = 40) -> Tensor:
    return torch.randn(count, OPTIONS.hidden, generator=torch.Generator().manual_seed(1))


def test_the_router_bias_chooses_experts() -> None:
    bias = torch.zeros(1, OPTIONS.experts)
    bias[0, 5] = 10.0  # more than any probability
    states = some_states()
    assert (sparse_mlp(bias).route(states).selected == 5).any(dim=1).all()
    assert not (sparse_mlp().route(states).selected == 5).any(dim=1).all()


def test_the_router_bias_never_enters_the_weights() -> None:
    bias = torch.randn(1, OPTIONS.experts, generator=torch.Generator().manual_seed(2))
    states = some_states()
    plain, biased = sparse_mlp().route(states), sparse_mlp(bias).route(states)
    assert torch.equal(plain.probabilities, biased.probabilities)
    assert not torch.equal(plain.selected, biased.selected)
    chosen = plain.probabilities.gather(1, biased.selected)
    torch.testing.assert_close(biased.weights, chosen / chosen.sum(1, keepdim=True))


def test_a_bias_equal_for_all_experts_changes_nothing() -> None:
    states = some_states()
    plain, biased = sparse_mlp().route(states), sparse_mlp(torch.full((1, OPTIONS.experts), 0.5)).route(states)
    assert torch.equal(plain.selected, biased.selected)
    assert torch.equal(plain.weights, biased.weights)


def test_the_experts_sum_equals_the_definition_token_by_token() -> None:
    mlp = sparse_mlp(torch.randn(1, OPTIONS.experts, generator=torch.Generator().manual_seed(2)))
    states = some_states()
    routing = mlp.route(states)
    wanted = torch.stack(
        [
            torch.stack(
                [
                    weight * mlp.experts[int(expert)](token)
                    for expert, weight in zip(chosen, weights, strict=True)
                ]
            ).sum(0)
            for token, chosen, weights in zip(states, routing.selected, routing.weights, strict=True)
        ]
    )
    torch.testing.assert_close(mlp.experts(states, routing), wanted)


def test_experts_that_nobody_selected_do_not_run() -> None:
    mlp = sparse_mlp()
    runs: list[int] = []
    for number, expert in enumerate(mlp.experts):
        expert.register_forward_pre_hook(lambda _module, inputs, number=number: runs.append(number))
    routing = Routing(torch.tensor([[6, 2], [2, 6]]), torch.full((2, 2), 0.5), torch.zeros(2, OPTIONS.experts))
    mlp.experts(some_states(2), routing)
    assert sorted(runs) == [2, 6]


def test_no_tokens_give_no_rows() -> None:
    assert sparse_mlp()(some_states(0)).shape == (0, OPTIONS.hidden)


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    states = some_states(6)
    mlp = sparse_mlp()
    torch.testing.assert_close(mlp(states.view(shape)), mlp(states).view(shape))


def test_the_router_multiplies_in_float32_in_a_bf16_model() -> None:
    mlp, states = sparse_mlp().bfloat16(), some_states().bfloat16()
    wanted = (states.float() @ mlp.gate.weight.float().T).softmax(dim=-1)
    torch.testing.assert_close(mlp.route(states).probabilities, wanted, rtol=1e-5, atol=1e-7)
    assert mlp(states).dtype == torch.bfloat16


def test_a_layer_is_the_sum_of_the_parts_that_calibration_calls() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(CONFIG, 1).requires_grad_(False)
    hidden = torch.randn(2, 7, OPTIONS.hidden)
    angles = torch.randn(7, OPTIONS.head_dim // 2)
    rotary = angles.cos(), angles.sin()
    before = hidden.clone()
    context = layer.self_attn.context(layer.input_layernorm(hidden), rotary, None)
    assert context.shape == (2, 7, OPTIONS.heads * OPTIONS.head_dim)
    middle = hidden + layer.self_attn.o_proj(context)
    flat = layer.post_attention_layernorm(middle).flatten(0, 1)
    experts = layer.mlp.experts(flat, layer.mlp.route(flat))
    shared = layer.mlp.shared_experts
    active = shared.activate(shared.gate_proj(flat), shared.up_proj(flat))
    wanted = middle + (experts + shared.down_proj(active)).view_as(middle)
    torch.testing.assert_close(layer(hidden, rotary), wanted)
    assert torch.equal(hidden, before)
