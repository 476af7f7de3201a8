from __future__ import annotations

from typing import Any

import pytest

from ernieq.bundled import bundled_model
from ernieq.checkpoint import load_tokenizer
from ernieq.errors import TextError
from ernieq.evaluate import tokenize_text

TEXT = "The old house — 章节 one 😀 \n end"


def test_the_begin_of_text_token_comes_first_and_once(make_tokenizer: Any) -> None:
    tokens = tokenize_text(make_tokenizer(bos_token_id=1), "abc")
    assert list(tokens.ids[:1]) == [1]
    assert len(tokens.ids) == 4


def test_a_tokenizer_without_bos_adds_no_token(make_tokenizer: Any) -> None:
    tokens = tokenize_text(make_tokenizer(bos_token_id=None), "abc")
    assert len(tokens.ids) == 3
    assert tokens.bos_token_id is None


def test_the_whole_text_is_tokenised_in_one_call(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenize_text(tokenizer, "abc" * 1000)
    assert tokenizer.calls == 1


def test_byte_counts_sum_to_the_size_of_the_text_even_where_a_token_is_part_of_a_character() -> None:
    tokens = tokenize_text(load_tokenizer(bundled_model()), TEXT)
    assert tokens.byte_counts is not None
    assert tokens.byte_counts.sum() == len(TEXT.encode("utf-8"))
    assert tokens.byte_counts[0] == 0
    assert (tokens.byte_counts >= 0).all()


def test_byte_counts_are_unknown_without_offsets(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.is_fast = False
    assert tokenize_text(tokenizer, "abc").byte_counts is None


def test_a_text_without_tokens_is_refused(make_tokenizer: Any) -> None:
    with pytest.raises(TextError, match="no tokens"):
        tokenize_text(make_tokenizer(), "")
