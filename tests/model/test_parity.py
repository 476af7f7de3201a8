"""Logits and positions against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeRotaryEmbedding,
    apply_rotary_pos_emb,
)

from ernieq.model import ModelConfig, Rotary
from ernieq.model.rotary import rotate_pairs
from tests.model.models import NANO, our_model, their_model, tokens_for
from tests.tiny import TinyOptions, tiny_config

VARIANTS: dict[str, dict[str, Any]] = {
    "moe": {},
    "moe-untied": {"tied": False},
    "moe-biases": {"use_bias": True},
    "moe-biases-untied": {"use_bias": True, "tied": False},
    "moe-without-shared-experts": {"shared_experts": 0},
    "moe-interval": {"layers": 6, "interval": 2},
    "moe-interval-from-layer-2": {"layers": 6, "interval": 3, "start": 2},
    "moe-from-layer-0": {"start": 0},
    "moe-ended-early": {"layers": 4, "end": 2},
    "moe-one-of-eight": {"experts": 8, "chosen": 1},
    "moe-all-experts": {"experts": 4, "chosen": 4},
    "moe-strong-router-bias": {"experts": 8, "chosen": 3, "router_bias": 1.0},
    "moe-large-norm-min": {"config": {"moe_norm_min": 0.9}},
    "moe-head-dim-absent": {"head_dim": 8, "config": {"head_dim": ...}},
    "moe-rope-parameters": {
        "config": {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}
    },
    "moe-rope-in-both-places": {
        "config": {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}
    },
    "moe-defaults-absent": {
        "start": 1,
        "config": dict.fromkeys(
            ["rms_norm_eps", "moe_norm_min", "moe_layer_end_index", "moe_layer_interval", "use_bias"], ...
        )
        | {"rope_theta": ..., "moe_layer_start_index": ..., "moe_num_shared_experts": ...},
    },
    "moe-with-mtp": {"mtp": True},
    "moe-one-key-head": {"heads": 4, "kv_heads": 1},
    "moe-ungrouped": {"heads": 2, "kv_heads": 2},
    "dense": {"moe": False},
    "dense-untied": {"moe": False, "tied": False},
    "dense-biases": {"moe": False, "use_bias": True},
    "dense-head-dim-absent": {"moe": False, "head_dim": 128, "heads": 2, "config": {"head_dim": ...}},
    "dense-other-eps-and-theta": {"moe": False, "config": {"rms_norm_eps": 0.1, "rope_theta": 100.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tiny: Callable[..., Path]) -> None:
    directory = tiny(**VARIANTS[variant])
    ours, theirs = our_model(directory), their_model(directory)
    token_ids = tokens_for(ours, 2, 21)
    with torch.inference_mode():
        found, wanted = ours(token_ids), theirs(token_ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_logits_of_the_bundled_model_equal_transformers() -> None:
    ours, theirs = our_model(NANO), their_model(NANO)
    token_ids = tokens_for(ours, 2, 96)
    with torch.inference_mode():
        found, wanted = ours(token_ids), theirs(token_ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_bf16_logits_are_as_near_to_float32_as_transformers_are(tiny: Callable[..., Path]) -> None:
    directory = tiny()
    ours, theirs = our_model(directory), their_model(directory)
    token_ids = tokens_for(ours, 2, 21)
    with torch.inference_mode():
        exact = theirs(token_ids).logits
        found = ours.to(torch.bfloat16)(token_ids)
        wanted = theirs.to(torch.bfloat16)(token_ids).logits.float()
    assert found.dtype == torch.float32
    assert (found - exact).square().mean() < 2 * (wanted - exact).square().mean()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_angles_equal_transformers_at_every_position_to_131071(head_dim: int) -> None:
    raw = tiny_config(TinyOptions(head_dim=head_dim))
    theirs = Ernie4_5_MoeRotaryEmbedding(Ernie4_5_MoeConfig(**raw))
    positions = torch.tensor([0, 1, 2, 4095, 32766, 32767, 32768, 100003, 131071])
    cosine, sine = Rotary(ModelConfig.from_dict(raw)).angles(positions)
    wanted_cosine, wanted_sine = theirs(torch.zeros(1), positions[None])  # (1, T, head_dim), halves repeated
    assert torch.equal(cosine, wanted_cosine[0, :, : head_dim // 2])
    assert torch.equal(sine, wanted_sine[0, :, : head_dim // 2])
    states = torch.randn(1, 3, len(positions), head_dim, generator=torch.Generator().manual_seed(0))
    turn: Any = apply_rotary_pos_emb
    wanted, _ = turn(states, states, wanted_cosine, wanted_sine)
    torch.testing.assert_close(rotate_pairs(states, (cosine, sine)), wanted, rtol=0, atol=1e-6)


def test_logits_at_position_32767_equal_transformers(tiny: Callable[..., Path]) -> None:
    """One layer, so that the context costs seconds; that attention looks back all the way is asserted too."""
    directory = tiny(layers=1, start=0, heads=1, kv_heads=1, head_dim=16, hidden=16)
    ours, theirs = our_model(directory), their_model(directory)
    token_ids = tokens_for(ours, 1, 32768)
    with torch.inference_mode():
        found = ours(token_ids, last_only=True)
        wanted = theirs(token_ids, logits_to_keep=1).logits
        token_ids[0, : 32768 // 2] = 5
        other = ours(token_ids, last_only=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert (found - other).abs().max() > 1e-3
