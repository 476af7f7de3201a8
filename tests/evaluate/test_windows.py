from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernieq.errors import TextError, UsageError
from ernieq.evaluate import Protocol, TokenizedText, make_windows

BOS = 1


def counting_text(tokens: int, bos: int | None = BOS) -> TokenizedText:
    """Token ids 100, 101, ...; each adds as many bytes as its index."""
    return TokenizedText(np.arange(100, 100 + tokens), np.arange(tokens), bos)


@given(st.integers(4, 40), st.integers(4, 200))
def test_windows_hold_every_token_once_in_order_and_drop_only_the_tail(window: int, tokens: int) -> None:
    text = counting_text(tokens)
    if tokens < window:
        with pytest.raises(TextError, match=f"has {tokens} tokens; one window of {window}"):
            make_windows(text, Protocol.GPTQ, window)
        return
    windows = make_windows(text, Protocol.GPTQ, window)
    assert windows.count == tokens // window
    assert windows.token_ids.reshape(-1).tolist() == list(range(100, 100 + windows.count * window))
    assert windows.scored == window - 1


def test_llama_cpp_scores_255_of_512_tokens_and_starts_each_window_with_bos() -> None:
    text = counting_text(1100)
    windows = make_windows(text, Protocol.LLAMA_CPP, 512)
    assert windows.first_scored == 256
    assert windows.scored == 255
    assert windows.token_ids[:, 0].tolist() == [BOS, BOS]
    assert windows.token_ids[:, 1].tolist() == [101, 613]
    assert text.ids[512] == 612, "the text itself must not change"


def test_llama_cpp_keeps_the_first_tokens_where_there_is_no_bos() -> None:
    windows = make_windows(counting_text(64, bos=None), Protocol.LLAMA_CPP, 16)
    assert windows.token_ids[:, 0].tolist() == [100, 116, 132, 148]


def test_an_odd_window_scores_the_positions_of_llama_perplexity() -> None:
    windows = make_windows(counting_text(9), Protocol.LLAMA_CPP, 9)
    assert (windows.first_scored, windows.scored) == (4, 9 - 1 - 9 // 2)


def test_covered_bytes_are_those_of_the_scored_tokens() -> None:
    text = counting_text(20)
    assert make_windows(text, Protocol.GPTQ, 8).covered_bytes == sum(range(1, 8)) + sum(range(9, 16))
    assert make_windows(text, Protocol.LLAMA_CPP, 8).covered_bytes == sum((5, 6, 7)) + sum((13, 14, 15))


def test_max_windows_keeps_the_first_ones() -> None:
    text = counting_text(50)
    assert make_windows(text, Protocol.GPTQ, 8, max_windows=2).token_ids[:, 0].tolist() == [100, 108]
    assert make_windows(text, Protocol.GPTQ, 8, max_windows=99).count == 6


@pytest.mark.parametrize(("window", "max_windows"), [(3, None), (8, 0)])
def test_meaningless_sizes_are_refused(window: int, max_windows: int | None) -> None:
    with pytest.raises(UsageError, match="at least"):
        make_windows(counting_text(50), Protocol.GPTQ, window, max_windows=max_windows)
