"""Packed checkpoints in transformers on a GPU, against the same on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.decode import TrellisWeight
from tests.integrations.transformers.packed_checkpoints import (
    TOKENS,
    assert_same_bytes,
    load,
    logits,
    stored_tensors,
    write_packed,
)
from tests.load.packed_model import DENSE, MOE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CONFIGS = {
    "moe": MOE,
    "dense": DENSE,
    "untied": dataclasses.replace(MOE, tie_word_embeddings=False, use_bias=True),
}


@pytest.fixture(params=CONFIGS)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_packed(tmp_path / "packed", CONFIGS[request.param])


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("device_map", ["cuda", "auto", 0, {"": "cuda:0"}])
def test_a_device_map_puts_a_packed_model_on_the_gpu(device_map: Any, packed: Path) -> None:
    model = load(packed, device_map=device_map)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert all(module.on_gpu for module in model.modules() if isinstance(module, TrellisWeight))
    assert relative(logits(model), logits(load(packed))) < 5e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_can_be_spread_over_two_gpus(packed: Path) -> None:
    places = {"embed_tokens": 0, "layers.0": 0, "layers.1": 1, "norm": 1, "rotary_emb": 1}
    model = load(packed, device_map={**{f"model.{part}": gpu for part, gpu in places.items()}, "lm_head": 1})
    assert model.model.layers[1].self_attn.q_proj.trellis.words.device.index == 1
    assert relative(logits(model), logits(load(packed))) < 5e-3


def test_a_model_can_be_moved_to_the_gpu_after_loading(packed: Path) -> None:
    model = load(packed)
    truth = logits(model)
    assert relative(logits(model.to("cuda")), truth) < 5e-3


def test_tokens_generated_with_a_cache_are_those_without(packed: Path) -> None:
    model = load(packed, device_map="cuda")
    options = {"max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(TOKENS.cuda(), **options)
    assert with_cache.shape == (2, 13)
    steps = model.generate(TOKENS.cuda(), **options, use_cache=False)
    assert (with_cache == steps).float().mean() > 0.9  # two tokens may be within a rounding of each other


def test_a_model_on_the_gpu_is_saved_bit_for_bit(packed: Path) -> None:
    load(packed, torch.bfloat16, device_map="cuda").save_pretrained(packed.with_name("saved"))
    assert_same_bytes(stored_tensors(packed.with_name("saved")), stored_tensors(packed))


def test_weights_dequantized_on_the_gpu_are_those_of_the_cpu_but_for_the_last_bit(packed: Path) -> None:
    found = load(packed, torch.bfloat16, device_map="cuda").dequantize().state_dict()
    truth = load(packed, torch.bfloat16).dequantize().state_dict()
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        # The rotation adds in another order; what is nearly halfway between two numbers may become the other.
        other = found[name].cpu()
        torch.testing.assert_close(other, tensor, rtol=2**-7, atol=1e-6)
        assert (other != tensor).float().mean() < 0.005, name
