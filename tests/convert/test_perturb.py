"""The KL of a perturbed copy is that of the whole model with those weights, whatever is measured beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.calibrate import Streams, collect_layer
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import Workplace
from ernieq.convert.groups import full_name
from ernieq.convert.perturb import Perturbed
from ernieq.convert.probe import Probe
from ernieq.convert.units import allocation_units
from ernieq.encode import emulated_errors, input_signs
from ernieq.load import load_model
from ernieq.model import DecoderLayer, ErnieForCausalLM
from tests.convert.conversions import VOCABULARY, quick_recipe

Tiny = Callable[..., Path]
CPU = Workplace.on(torch.device("cpu"))
ERROR = 0.07


def probe(seed: int = 0) -> Probe:
    draw = torch.Generator().manual_seed(seed)
    return Probe(
        torch.randint(3, VOCABULARY, (4, 24), generator=draw),
        torch.randint(3, VOCABULARY, (6, 32), generator=draw),
    )


@torch.no_grad()
def grams_of(model: ErnieForCausalLM, tokens: torch.Tensor, layer: int | None) -> dict[str, torch.Tensor]:
    """Hessians of a layer of the whole model; of the head's input for None."""
    hidden = model.model.embed_tokens(tokens)
    streams = Streams(hidden, hidden.clone())
    from ernieq.model import Rotary

    rotary = Rotary(model.config).angles(torch.arange(tokens.shape[1]))
    for index, module in enumerate(model.model.layers):
        assert isinstance(module, DecoderLayer)
        grams = collect_layer(model.config, index, module, streams, rotary, 1.0).grams
        if index == layer:
            return grams
    inputs = model.model.norm(streams.reference).flatten(0, 1)
    return {"lm_head": inputs.T @ inputs / inputs.shape[0]}


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"moe": False, "use_bias": True}], ids=str)
@torch.no_grad()
def test_a_copy_computes_what_the_whole_model_computes_with_its_weights(
    tiny: Tiny, options: dict[str, Any]
) -> None:
    source, tokens, recipe = tiny(**options), probe(), quick_recipe()
    checkpoint = open_checkpoint(source)
    units = allocation_units(checkpoint.config, recipe, ())
    copies = [{unit.name: ERROR} for unit in units]
    found = Perturbed(checkpoint, units, recipe, CPU).divergences(tokens, copies)
    base = torch.log_softmax(load_model(source)(tokens.scored), dim=-1)
    for unit, kl in zip(units, found, strict=True):
        model = load_model(source)
        embedding = unit.name == "model.embed_tokens"
        grams = {} if embedding else grams_of(model, tokens.seen, unit.layer)
        for group in unit.groups:
            names = [full_name(unit.layer, name) for name in group.names]
            weights = {name: model.get_parameter(f"{name}.weight").data for name in names}
            width = next(iter(weights.values())).shape[1]
            signs = input_signs(0, full_name(unit.layer, group.signs), width)
            errors = emulated_errors(weights, None if embedding else grams[group.gram], signs, 0.01, 0)
            for name, weight in weights.items():
                weight += ERROR**0.5 * errors[name]
        changed = torch.log_softmax(model(tokens.scored), dim=-1)
        expected = (base.exp() * (base - changed)).sum(-1).mean(1)
        assert kl == pytest.approx(expected.numpy(), rel=0.03), unit.name
        assert (kl > 1e-5).all()


def test_no_error_is_no_divergence_and_more_error_is_more(tiny: Tiny) -> None:
    checkpoint, recipe = open_checkpoint(tiny()), quick_recipe()
    units = allocation_units(checkpoint.config, recipe, ())
    copies = [dict.fromkeys((unit.name for unit in units), error) for error in (0.0, 0.001, 0.01, 0.1)]
    found = Perturbed(checkpoint, units, recipe, CPU).divergences(probe(), [{}, *copies[1:]])
    none, little, some, much = found.mean(axis=1)
    assert none == 0
    assert 0 < 3 * little < some < much / 3


def test_copies_do_not_depend_on_each_other_and_the_seed_decides(tiny: Tiny) -> None:
    checkpoint = open_checkpoint(tiny())
    units = allocation_units(checkpoint.config, quick_recipe(), ())
    errors = [{unit.name: ERROR} for unit in units]
    together = Perturbed(checkpoint, units, quick_recipe(), CPU).divergences(probe(), errors)
    alone = Perturbed(checkpoint, units, quick_recipe(), CPU).divergences(probe(), errors[5:6])
    assert (alone == together[5:6]).all()
    other = Perturbed(checkpoint, units, quick_recipe(seed=1), CPU).divergences(probe(), errors[5:6])
    assert (other != alone).all()
