"""The KV cache: however the tokens come in, the logits are those of one pass over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernieq.errors import UsageError
from ernieq.model import KVCache
from tests.model.models import our_model, tokens_for

TOKENS = 19


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, TOKENS - 1), unique=True, max_size=5))
def test_a_prompt_in_chunks_gives_the_logits_of_one_pass(tiny: Callable[..., Path], cuts: list[int]) -> None:
    model = our_model(tiny())
    token_ids = tokens_for(model, 2, TOKENS)
    cache = KVCache(model.config, batch=2, max_tokens=TOKENS)
    edges = [0, *sorted(cuts), TOKENS]
    with torch.inference_mode():
        parts = [model(token_ids[:, begin:end], cache) for begin, end in itertools.pairwise(edges)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(token_ids), rtol=1e-4, atol=1e-5)
    assert cache.length == TOKENS


@pytest.mark.parametrize("moe", [True, False])
def test_token_by_token_gives_the_logits_of_one_pass(tiny: Callable[..., Path], moe: bool) -> None:
    model = our_model(tiny(moe=moe, use_bias=True))
    token_ids = tokens_for(model, 1, TOKENS)
    cache = KVCache(model.config, batch=1, max_tokens=TOKENS + 5)
    with torch.inference_mode():
        steps = [model(token_ids[:, [place]], cache) for place in range(TOKENS)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(token_ids), rtol=1e-4, atol=1e-5)


def test_last_only_gives_the_last_row_of_all_logits(tiny: Callable[..., Path]) -> None:
    model = our_model(tiny())
    token_ids = tokens_for(model, 2, TOKENS)
    with torch.inference_mode():
        torch.testing.assert_close(model(token_ids, last_only=True), model(token_ids)[:, -1:])


def test_a_bf16_cache_changes_the_logits_by_less_than_its_precision(tiny: Callable[..., Path]) -> None:
    model = our_model(tiny())
    token_ids = tokens_for(model, 1, TOKENS)
    cache = KVCache(model.config, max_tokens=TOKENS, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(token_ids[:, :-1], cache)
        found, wanted = model(token_ids[:, -1:], cache), model(token_ids)[:, -1:]
    assert 0 < (found - wanted).abs().max() < 2**-6 * wanted.abs().max()


def test_a_cache_that_is_full_refuses_tokens_and_keeps_its_length(tiny: Callable[..., Path]) -> None:
    model = our_model(tiny())
    cache = KVCache(model.config, max_tokens=8)
    token_ids = tokens_for(model, 1, 9)
    with torch.inference_mode():
        model(token_ids[:, :5], cache)
        with pytest.raises(UsageError, match="holds 8 tokens; 9 are needed"):
            model(token_ids[:, 5:], cache)
        assert cache.length == 5
        found = model(token_ids[:, 5:8], cache)
        torch.testing.assert_close(found, model(token_ids[:, :8])[:, 5:], rtol=1e-4, atol=1e-5)
