"""The runtime on a GPU: the real kernels and the captured graph against the model's forward pass on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from ernieq.load import load_model
from ernieq.model import ErnieForCausalLM, ModelConfig
from ernieq.runtime import PackedRuntime, prefill, products
from tests.runtime.models import (
    DENSE,
    NO_SHARED,
    SMALL,
    UNTIED_BIAS,
    Bits,
    bits_of_layers,
    mixed_bits,
    recipe_bits,
    tokens,
    write_packed,
)
from tests.runtime.test_runtime import check_close, expected_logits, runtime_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found"),
]
PROMPT, STEPS = 21, 6
# One layer of the 21B model with experts, behind a vocabulary that the CPU can check in seconds.
WIDE = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=96,
    hidden_size=2560,
    intermediate_size=12288,
    num_hidden_layers=1,
    num_attention_heads=20,
    num_key_value_heads=4,
    head_dim=128,
    moe_num_experts=64,
    moe_k=6,
    moe_intermediate_size=1536,
    moe_num_shared_experts=2,
)
CASES: list[tuple[str, ModelConfig, Bits]] = [
    ("a mixture of experts", SMALL, recipe_bits),
    ("codes that differ among matrices of one input", SMALL, mixed_bits),
    ("half bits, others in every layer", SMALL, bits_of_layers),
    ("an untied head and biases", UNTIED_BIAS, recipe_bits),
    ("no shared experts", NO_SHARED, recipe_bits),
    ("a dense model", DENSE, recipe_bits),
]


def models(path: Path) -> tuple[ErnieForCausalLM, ErnieForCausalLM]:
    return load_model(path), load_model(path, device="cuda")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("config", "bits"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_prompt_and_steps_give_the_logits_of_the_model(
    config: ModelConfig, bits: Bits, batch: int, graph: bool, tmp_path: Path
) -> None:
    plain, packed = models(write_packed(tmp_path / "packed", config, bits))
    ids = tokens(PROMPT + STEPS, batch=batch)
    runtime = PackedRuntime(packed, max_tokens=PROMPT + STEPS, batch=batch, graph=graph)
    found = [logits.cpu() for logits in runtime_logits(runtime, ids, PROMPT)]
    check_close(found, expected_logits(plain, ids, PROMPT), outliers=1 + batch // 4)


def test_a_layer_of_the_21b_model_gives_the_logits_of_the_cpu(tmp_path: Path) -> None:
    batch = 2
    plain, packed = models(write_packed(tmp_path / "packed", WIDE))
    ids = tokens(200 + STEPS, batch=batch)
    runtime = PackedRuntime(packed, max_tokens=300, batch=batch)
    found = [logits.cpu() for logits in runtime_logits(runtime, ids, 200)]
    check_close(found, expected_logits(plain, ids, 200), outliers=3)


def test_a_prompt_in_parts_through_decoded_weights_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "PART_ROWS", 96)
    monkeypatch.setattr(products, "FUSED_ROWS", 0)
    monkeypatch.setattr(products, "_DECODED_WEIGHTS", 9000)
    monkeypatch.setattr(products, "INNER_NUMBERS", 2000)
    plain, packed = models(write_packed(tmp_path / "packed", SMALL, mixed_bits))
    ids = tokens(161, batch=2)
    runtime = PackedRuntime(packed, max_tokens=200, batch=2)
    found = [logits.cpu() for logits in runtime_logits(runtime, ids, 160)]
    check_close(found, expected_logits(plain, ids, 160), outliers=1)


def test_captured_sampling_gives_what_single_kernels_give(tmp_path: Path) -> None:
    packed = load_model(write_packed(tmp_path / "packed", SMALL), device="cuda")
    drawn = []
    for graph in (False, True):
        runtime = PackedRuntime(copy.copy(packed), max_tokens=64, batch=2, graph=graph)
        runtime.prefill(tokens(9, batch=2))
        runtime.start_sampling()
        drawn.append(torch.cat(list(runtime.sample(30)), dim=1))
    assert torch.equal(drawn[0], drawn[1])


def test_one_seed_gives_one_text_whatever_was_drawn_before(tmp_path: Path) -> None:
    packed = load_model(write_packed(tmp_path / "packed", SMALL), device="cuda")
    runtime = PackedRuntime(packed, max_tokens=64)

    def drawn(seed: int) -> list[int]:
        runtime.prefill(tokens(9))
        runtime.start_sampling(temperature=3.0, top_p=0.9, seed=seed)
        return [int(token) for group in runtime.sample(30) for token in group[0]]

    first = drawn(1)
    assert drawn(2) != first
    assert drawn(1) == first


def test_capturing_in_the_middle_of_a_text_changes_nothing(tmp_path: Path) -> None:
    plain, packed = models(write_packed(tmp_path / "packed", SMALL))
    ids = tokens(12)
    runtime = PackedRuntime(packed, max_tokens=12)
    before = runtime.prefill(ids[:, :10]).clone()
    runtime.start_sampling(temperature=1.0)  # captures
    after = runtime.step(ids[:, 10]).clone()  # captures
    last = runtime.step(ids[:, 11]).clone()
    check_close([part.cpu() for part in (before, after, last)], expected_logits(plain, ids, 10))
