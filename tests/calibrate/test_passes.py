"""The passes collect what hooks on a plain forward pass of the same layer see."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ernieq.calibrate import AttentionPass, MlpPass, Streams, collect_layer, streams
from ernieq.checkpoint import open_checkpoint
from ernieq.load import load_model
from ernieq.model import DecoderLayer, ErnieForCausalLM, Rotary

WINDOWS, LENGTH, HIDDEN = 3, 20, 32
DENSE, MOE = 0, 1


@pytest.fixture
def model(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> ErnieForCausalLM:
    """A dense layer, then two of experts; streams are worked off two windows at a time."""
    monkeypatch.setattr(streams, "TOKENS_PER_BATCH", 2 * LENGTH)
    return load_model(tiny())


@pytest.fixture
def biased(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> ErnieForCausalLM:
    monkeypatch.setattr(streams, "TOKENS_PER_BATCH", 2 * LENGTH)
    return load_model(tiny(moe=False, use_bias=True))


def rotary_of(model: ErnieForCausalLM) -> tuple[Tensor, Tensor]:
    return Rotary(model.config).angles(torch.arange(LENGTH))


def two_streams(difference: float) -> Streams:
    draw = torch.Generator().manual_seed(0)
    reference = torch.randn(WINDOWS, LENGTH, HIDDEN, generator=draw)
    change = torch.randn(reference.shape, generator=draw)
    return Streams(reference, reference + difference * change)


def perturbed(layer: DecoderLayer, amount: float = 0.05) -> DecoderLayer:
    """A copy whose projections are a little off, as quantized ones are."""
    copied, draw = copy.deepcopy(layer), torch.Generator().manual_seed(1)
    for module in copied.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[0] != 4:  # all but the router of 4 experts
            module.weight.data += amount * torch.randn(module.weight.shape, generator=draw)
    return copied


@contextmanager
def inputs_of(layer: DecoderLayer, *names: str) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs of modules by name, flattened to (tokens, width), in the order of their calls."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen[name].append(
                inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            )
        )
        for name in names
    ]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def plain_forward(layer: DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    behind: Tensor = layer(hidden, rotary)
    return behind


def mean_gram(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of s x x^T over tokens, in float64."""
    wide = inputs.double()
    s = torch.ones(len(wide)).double() if weights is None else weights.double()
    return (torch.einsum("t,ti,tj->ij", s, wide, wide) / s.sum()).float()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def mlp_pass(
    model: ErnieForCausalLM, index: int, both: Streams, coded: DecoderLayer | None = None
) -> tuple[MlpPass, DecoderLayer, DecoderLayer]:
    """A pass over hidden states that are taken as standing behind the attention."""
    layer = model.model.layers[index]
    assert isinstance(layer, DecoderLayer)
    coded = coded or layer
    return MlpPass(layer, coded, both), layer, coded


def test_attention_moments_are_those_of_what_q_and_o_read(model: ErnieForCausalLM) -> None:
    layer, both, rotary = model.model.layers[MOE], two_streams(0.1), rotary_of(model)
    assert isinstance(layer, DecoderLayer)
    coded = perturbed(layer)
    attention = AttentionPass(layer, coded, both, rotary)
    inputs, contexts = attention.input_moments(), attention.context_moments()
    with inputs_of(coded, "self_attn.q_proj", "self_attn.o_proj") as seen:
        plain_forward(coded, both.quantized, rotary)
    assert inputs.tokens == contexts.tokens == WINDOWS * LENGTH
    close(inputs.mean_gram(), mean_gram(seen["self_attn.q_proj"][0]))
    close(contexts.mean_gram(), mean_gram(seen["self_attn.o_proj"][0]))


def test_attention_residuals_are_what_leads_back_to_the_reference(biased: ErnieForCausalLM) -> None:
    layer, both, rotary = biased.model.layers[0], two_streams(0.1), rotary_of(biased)
    assert isinstance(layer, DecoderLayer)
    coded = perturbed(layer)
    attention = AttentionPass(layer, coded, both, rotary)
    inputs, contexts = attention.input_moments(), attention.context_moments()
    with (
        inputs_of(layer, "self_attn.q_proj", "self_attn.o_proj") as wanted,
        inputs_of(coded, "self_attn.q_proj", "self_attn.o_proj") as got,
    ):
        plain_forward(layer, both.reference, rotary)
        plain_forward(coded, both.quantized, rotary)
    x, y = got["self_attn.q_proj"][0], wanted["self_attn.q_proj"][0]
    close(inputs.mean_residual(), (y - x).T @ x / len(x))
    # What the stream must gain by o so as to equal the reference behind the attention.
    context, output = got["self_attn.o_proj"][0], layer.self_attn.o_proj
    behind = both.reference.view(-1, HIDDEN) + output(wanted["self_attn.o_proj"][0])
    lacking = behind - both.quantized.view(-1, HIDDEN) - output(context)
    close(contexts.mean_residual(), lacking.T @ context / len(context))


@pytest.mark.parametrize("index", [DENSE, MOE])
def test_streams_behind_a_layer_equal_a_plain_forward_of_both_layers(
    model: ErnieForCausalLM, index: int
) -> None:
    layer, both, rotary = model.model.layers[index], two_streams(0.1), rotary_of(model)
    assert isinstance(layer, DecoderLayer)
    coded = perturbed(layer)
    wanted = [
        plain_forward(layer, both.reference, rotary),
        plain_forward(coded, both.quantized, rotary),
    ]
    walk(layer, coded, both, rotary, experts=4 if index == MOE else 0)
    close(both.reference, wanted[0])
    close(both.quantized, wanted[1])


def walk(
    layer: DecoderLayer,
    coded: DecoderLayer,
    both: Streams,
    rotary: tuple[Tensor, Tensor],
    *,
    experts: int,
) -> dict[str, Tensor]:
    """Both passes in their order; returns all residuals by name."""
    attention = AttentionPass(layer, coded, both, rotary)
    residuals = {"q": attention.input_moments().residual, "o": attention.context_moments().residual}
    attention.advance()
    mlp, path = MlpPass(layer, coded, both), "mlp.shared_experts" if experts else "mlp"
    residuals["gate"] = mlp.input_moments().residual
    for expert in range(experts):
        mlp.expert_input_moments(expert)
        own, prior = mlp.expert_down_moments(expert)
        residuals |= {f"{expert}.own": own.residual, f"{expert}.prior": prior.residual}
        mlp.add_expert(expert)
    residuals["down"] = mlp.down_moments(path).residual
    mlp.advance(path)
    return residuals


@pytest.mark.parametrize("index", [DENSE, MOE])
def test_residuals_vanish_where_nothing_was_quantized_and_only_there(
    model: ErnieForCausalLM, index: int
) -> None:
    layer, rotary, experts = model.model.layers[index], rotary_of(model), 4 if index == MOE else 0
    assert isinstance(layer, DecoderLayer)
    same = walk(layer, layer, two_streams(0.0), rotary, experts=experts)
    other = walk(layer, perturbed(layer), two_streams(0.1), rotary, experts=experts)
    assert {name: float(residual.abs().max()) < 1e-3 for name, residual in same.items()} == dict.fromkeys(
        same, True
    )
    assert {name: float(residual.abs().max()) > 1 for name, residual in other.items()} == dict.fromkeys(
        other, True
    )


def test_expert_moments_are_those_of_its_routed_tokens_weighted_by_the_squared_weight(
    model: ErnieForCausalLM,
) -> None:
    both = two_streams(0.1)
    mlp, _, coded = mlp_pass(model, MOE, both)
    inputs = mlp.input_moments()
    normed = coded.post_attention_layernorm(both.quantized.view(-1, HIDDEN))
    close(inputs.mean_gram(), mean_gram(normed))
    routing = coded.mlp.route(normed)
    counts = []
    for expert in range(4):
        chosen = routing.selected == expert
        tokens, weights = chosen.any(dim=1), routing.weights[chosen]
        own = mlp.expert_input_moments(expert)
        close(own.mean_gram(), mean_gram(normed[tokens], weights.square()))
        assert own.weight == pytest.approx(float(weights.square().sum()), rel=1e-5)
        down, prior = mlp.expert_down_moments(expert)
        plain = coded.mlp.experts[expert]
        active = plain.activate(plain.gate_proj(normed), plain.up_proj(normed))
        close(down.mean_gram(), mean_gram(active[tokens], weights.square()))
        close(prior.mean_gram(), mean_gram(active))  # fewer tokens than PRIOR_TOKENS: all of them
        counts.append(own.tokens)
    assert sum(counts) == 2 * WINDOWS * LENGTH
    assert len(set(counts)) > 1  # or a mix-up of experts could not be seen


@pytest.mark.parametrize(("index", "path"), [(DENSE, "mlp"), (MOE, "mlp.shared_experts")])
def test_the_down_moments_are_those_of_what_down_reads_and_lacks(
    model: ErnieForCausalLM, index: int, path: str
) -> None:
    both = two_streams(0.1)
    layer = model.model.layers[index]
    assert isinstance(layer, DecoderLayer)
    mlp, _, coded = mlp_pass(model, index, both, perturbed(layer))
    mlp.input_moments()
    for expert in range(4 if index == MOE else 0):
        mlp.expert_down_moments(expert)
        mlp.add_expert(expert)
    moments = mlp.down_moments(path)
    flat = {name: getattr(both, name).view(-1, HIDDEN) for name in ("reference", "quantized")}
    with torch.no_grad(), inputs_of(coded, f"{path}.down_proj") as seen:
        output = coded.mlp(coded.post_attention_layernorm(flat["quantized"]))
        wanted = flat["reference"] + layer.mlp(layer.post_attention_layernorm(flat["reference"]))
        active = seen[f"{path}.down_proj"][0]
        down, coded_down = (side.get_submodule(f"{path}.down_proj") for side in (layer, coded))
        lacking = wanted - (flat["quantized"] + output - coded_down(active) + down(active))
    close(moments.mean_gram(), mean_gram(active))
    close(moments.mean_residual(), lacking.T @ active / len(active))


def test_collected_statistics_hold_every_input_of_a_layer(tiny: Callable[..., Path]) -> None:
    directory = tiny()
    model, rotary = load_model(directory), None
    rotary = rotary_of(model)
    config = open_checkpoint(directory).config
    widths = {}
    for index in (DENSE, MOE):
        layer = model.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        found = collect_layer(config, index, layer, two_streams(0.0), rotary, 1.0)
        widths[index] = {name: gram.shape[0] for name, gram in found.grams.items()}
        assert all(torch.equal(gram, gram.T) or torch.allclose(gram, gram.T) for gram in found.grams.values())
        assert sum(found.expert_tokens) == (2 * WINDOWS * LENGTH if index == MOE else 0)
    assert widths[DENSE] == {"self_attn.input": 32, "self_attn.context": 64, "mlp.input": 32, "mlp.hidden": 48}
    experts = {
        f"mlp.experts.{e}.{side}": width for e in range(4) for side, width in (("input", 32), ("hidden", 16))
    }
    assert (
        widths[MOE]
        == {
            "self_attn.input": 32,
            "self_attn.context": 64,
            "mlp.input": 32,
            "mlp.shared_experts.hidden": 32,
        }
        | experts
    )
