"""The runtime against the model's own forward pass, with plain-torch doubles of the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ernieq.errors import BackendUnavailableError, NonFiniteError, ShapeError, UsageError
from ernieq.load import load_model
from ernieq.model import ErnieForCausalLM, KVCache, ModelConfig, ParameterRole
from ernieq.runtime import PackedRuntime, prefill, products
from tests.decode import fake_kernels
from tests.load.packed_model import by_role, write_model
from tests.runtime.models import (
    DENSE,
    NO_SHARED,
    SMALL,
    UNTIED_BIAS,
    Bits,
    bits_of_layers,
    mixed_bits,
    model_pair,
    recipe_bits,
    tokens,
    with_words,
    write_packed,
)

PROMPT, STEPS = 21, 4


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(monkeypatch)


def expected_logits(model: ErnieForCausalLM, ids: Tensor, prompt: int) -> list[Tensor]:
    """Logits after the prompt and after each further token: (B, V) each."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1])
    with torch.inference_mode():
        parts = [ids[:, :prompt], *(column[:, None] for column in ids[:, prompt:].unbind(1))]
        return [model(part, cache, last_only=True)[:, -1] for part in parts]


def runtime_logits(runtime: PackedRuntime, ids: Tensor, prompt: int) -> list[Tensor]:
    return [
        runtime.prefill(ids[:, :prompt]).clone(),
        *(runtime.step(column).clone() for column in ids[:, prompt:].unbind(1)),
    ]


def check_close(found: list[Tensor], expected: list[Tensor], *, outliers: int = 0) -> None:
    """Compare logits, (B, V) each, sequence by sequence.

    Where a router hesitates between two experts, a rounding can choose the other one: ``outliers`` sequences
    may be further off.
    """
    mine, theirs = torch.stack(found).flatten(0, 1), torch.stack(expected).flatten(0, 1)  # (rows, V)
    assert mine.shape == theirs.shape
    close = (mine - theirs).norm(dim=1) / theirs.norm(dim=1) < 1e-2
    assert int((~close).sum()) <= outliers
    mine, theirs = mine[close], theirs[close]
    chosen = theirs.gather(1, mine.argmax(1, keepdim=True))[:, 0]
    assert bool((theirs.amax(1) - chosen <= 0.02 * theirs.std(1)).all()), "another token is the most likely"


CASES: list[tuple[str, ModelConfig, Bits, bool]] = [
    ("a mixture of experts", SMALL, recipe_bits, True),
    ("codes that differ among matrices of one input", SMALL, mixed_bits, True),
    ("half bits, others in every layer", SMALL, bits_of_layers, True),
    ("an untied head and biases", UNTIED_BIAS, recipe_bits, True),
    ("no shared experts", NO_SHARED, recipe_bits, True),
    ("a dense model", DENSE, recipe_bits, True),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("config", "bits", "alike"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_prompt_and_steps_give_the_logits_of_the_model(
    config: ModelConfig, bits: Bits, alike: bool, batch: int, tmp_path: Path
) -> None:
    plain, packed = model_pair(write_packed(tmp_path / "packed", config, bits, one_rotation=alike))
    ids = tokens(PROMPT + STEPS, batch=batch)
    runtime = PackedRuntime(packed, max_tokens=PROMPT + STEPS, batch=batch, graph=False)
    check_close(runtime_logits(runtime, ids, PROMPT), expected_logits(plain, ids, PROMPT))


@pytest.mark.parametrize("part", [8, 9, 64])
@pytest.mark.parametrize("numbers", [4096, 9000, 1 << 20])
def test_a_prompt_in_parts_through_decoded_weights_gives_the_same(
    part: int, numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "PART_ROWS", part)
    monkeypatch.setattr(products, "FUSED_ROWS", 0)
    monkeypatch.setattr(products, "_DECODED_WEIGHTS", numbers)
    monkeypatch.setattr(products, "INNER_NUMBERS", numbers // 4)
    plain, packed = model_pair(write_packed(tmp_path / "packed", SMALL, mixed_bits))
    ids = tokens(PROMPT + 1, batch=2)
    runtime = PackedRuntime(packed, max_tokens=64, batch=2, graph=False)
    check_close(runtime_logits(runtime, ids, PROMPT), expected_logits(plain, ids, PROMPT))


def test_a_second_prompt_begins_anew_or_behind_a_kept_part(tmp_path: Path) -> None:
    plain, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    runtime = PackedRuntime(packed, max_tokens=40, graph=False)
    runtime.prefill(tokens(30, seed=1))
    ids = tokens(20)
    expected = expected_logits(plain, ids, 20)
    check_close([runtime.prefill(ids).clone()], expected)
    check_close([runtime.prefill(ids[:, 12:], past=12).clone()], expected)
    assert runtime.length == 20


def test_greedy_sampling_takes_the_most_likely_token_and_feeds_it_back(tmp_path: Path) -> None:
    _, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    ids = tokens(9, batch=2)
    runtime = PackedRuntime(packed, max_tokens=40, batch=2, graph=False)
    runtime.prefill(ids)
    runtime.start_sampling()
    drawn = torch.cat(list(runtime.sample(12, group=5)), dim=1)
    assert drawn.shape == (2, 12)
    by_hand = [runtime.prefill(ids).argmax(-1)]
    for _ in range(11):
        by_hand.append(runtime.step(by_hand[-1]).argmax(-1))
    assert torch.equal(torch.stack(by_hand, dim=1), drawn)


def test_draws_depend_on_the_seed_and_stay_within_top_p(tmp_path: Path) -> None:
    _, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    runtime = PackedRuntime(packed, max_tokens=80, graph=False)

    def drawn(**options: Any) -> list[int]:
        runtime.prefill(tokens(5))
        runtime.start_sampling(**options)
        return [int(token) for group in runtime.sample(20) for token in group[0]]

    hot = {"temperature": 5.0, "top_p": 1.0}
    assert drawn(**hot, seed=1) == drawn(**hot, seed=1)
    assert drawn(**hot, seed=1) != drawn(**hot, seed=2)
    assert drawn(temperature=5.0, top_p=1e-6, seed=3) == drawn(temperature=0.0)


def test_a_context_that_is_too_long_is_refused_in_one_sentence(tmp_path: Path) -> None:
    _, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    runtime = PackedRuntime(packed, max_tokens=10, graph=False)
    with pytest.raises(UsageError, match="holds 10 tokens; 11 are needed"):
        runtime.prefill(tokens(11))
    runtime.prefill(tokens(10))
    with pytest.raises(UsageError, match="11 are needed"):
        runtime.step(torch.tensor([1]))
    with pytest.raises(UsageError, match="11 are needed"):
        runtime.start_sampling()
    runtime.prefill(tokens(8))
    with pytest.raises(UsageError, match="12 are needed"):
        next(runtime.sample(4))
    with pytest.raises(UsageError, match="can't go on at 11"):
        runtime.seek(11)


def test_bad_prompts_and_batches_are_refused(tmp_path: Path) -> None:
    _, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    with pytest.raises(UsageError, match="9 sequences"):
        PackedRuntime(packed, max_tokens=10, batch=9)
    with pytest.raises(UsageError, match="context of 0"):
        PackedRuntime(packed, max_tokens=0)
    runtime = PackedRuntime(packed, max_tokens=10, batch=2, graph=False)
    with pytest.raises(ShapeError, match=r"\(1, 3\)"):
        runtime.prefill(tokens(3))
    with pytest.raises(UsageError, match="span 5 to 96"):
        runtime.prefill(torch.tensor([[5, 96], [5, 6]]))


def test_weights_are_held_once(tmp_path: Path) -> None:
    _, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    runtime = PackedRuntime(packed, max_tokens=10, graph=False)
    attention: Any = packed.model.layers[0].self_attn
    (words,) = (part.words for part in runtime.plan.layers[0].qkv.parts)
    storage = words.untyped_storage().data_ptr()
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert linear.words.untyped_storage().data_ptr() == storage
    assert PackedRuntime(packed, max_tokens=10, graph=False).plan.layers[0].qkv.rows == words.shape[0] * 16


def test_damaged_weights_are_found_while_sampling(tmp_path: Path) -> None:
    _, packed = model_pair(write_packed(tmp_path / "packed", SMALL))
    norm: Any = packed.model.norm
    norm.weight.fill_(torch.nan)
    runtime = PackedRuntime(packed, max_tokens=10, graph=False)
    runtime.prefill(tokens(3))
    runtime.start_sampling()
    with pytest.raises(NonFiniteError):
        list(runtime.sample(2))


def test_models_that_it_can_t_run_are_named(tmp_path: Path) -> None:
    on_cpu = load_model(write_packed(tmp_path / "cpu", SMALL), threads=1)
    assert "is not on a GPU" in PackedRuntime.supports(on_cpu)
    with pytest.raises(BackendUnavailableError, match=r"can't take this model: .* is not on a GPU"):
        PackedRuntime(on_cpu, max_tokens=8)
    _, unlike = model_pair(write_packed(tmp_path / "unlike", SMALL, one_rotation=False))
    assert "rotat" in PackedRuntime.supports(unlike)
    write_model(tmp_path / "partly", SMALL, by_role({ParameterRole.ATTENTION}))
    assert "not in the trellis code" in PackedRuntime.supports(load_model(tmp_path / "partly"))
    assert PackedRuntime.supports(with_words(on_cpu)) == ""
