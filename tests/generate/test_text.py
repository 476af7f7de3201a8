"""Pieces of text: nothing lost, nothing shown too early."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernieq.generate.text import StopWatch, TextPieces


class ByteTokenizer:
    """Every byte is a token, as in the worst case of a byte-level tokenizer."""

    def decode(self, ids: list[int], **_options: Any) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class WordTokenizer:
    """Joins words with spaces, none before the first: the text of a token depends on its place."""

    def decode(self, ids: list[int], **_options: Any) -> str:
        return " ".join(f"w{number}" for number in ids)


@given(st.text(max_size=20))
def test_pieces_join_to_the_whole_text_and_never_show_half_a_character(text: str) -> None:
    pieces = TextPieces(ByteTokenizer(), list(b"prompt"))
    shown = [pieces.add(byte) for byte in text.encode()]
    shown.append(pieces.finish())
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_a_character_that_is_never_finished_is_shown_at_the_end() -> None:
    pieces = TextPieces(ByteTokenizer(), [])
    assert [pieces.add(byte) for byte in "é".encode()[:1]] == [""]
    assert pieces.finish() == "\ufffd"


def test_spaces_between_tokens_are_kept_from_the_first_on() -> None:
    pieces = TextPieces(WordTokenizer(), [1, 2])
    assert [pieces.add(3), pieces.add(4), pieces.add(5)] == [" w3", " w4", " w5"]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([], "one two\n\nthree END four"),
        (["END"], "one two\n\nthree "),
        (["four", "\n\n"], "one two"),
        (["three END four five", "twoo"], "one two\n\nthree END four"),
        (["e", "ne"], "o"),
    ],
)
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(
    stops: list[str], expected: str, size: int
) -> None:
    text = "one two\n\nthree END four"
    watch, shown = StopWatch(stops), ""
    for start in range(0, len(text), size):
        shown += watch.add(text[start : start + size])
        if watch.stopped:
            break
    assert shown + watch.finish() == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    watch = StopWatch(["abc"])
    assert [watch.add("xa"), watch.add("b"), watch.add("ax"), watch.add("ab")] == ["x", "", "abax", ""]
    assert watch.finish() == "ab"
