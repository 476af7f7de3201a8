from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ernieq.errors import TextError
from ernieq.evaluate import load_text, text_names


def test_a_bundled_name_is_read_without_a_path() -> None:
    for name in text_names():
        assert len(load_text(name).text) > 10_000


def test_an_unknown_name_is_refused_and_the_known_names_are_listed(tmp_path: Path) -> None:
    (tmp_path / "poems.txt").write_text("one")
    with pytest.raises(TextError, match=r"no text named 'prose' .* known names: poems"):
        load_text("prose", named={"poems": tmp_path / "poems.txt"})


def test_line_ends_are_kept_as_they_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n")
    text = load_text(str(path))
    assert text.text == "one\r\ntwo\n"
    assert text.sha256 == hashlib.sha256(b"one\r\ntwo\n").hexdigest()


def test_a_cut_never_splits_a_character_and_the_hash_is_of_what_remains(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab章节", encoding="utf-8")
    text = load_text(str(path), max_bytes=6)
    assert text.text == "ab章"
    assert text.sha256 == hashlib.sha256("ab章".encode()).hexdigest()
    assert load_text(str(path), max_bytes=8).text == "ab章节"


def test_the_texts_of_a_jsonl_file_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\u2028two"}\n\n{"text": "three", "source": "x"}\n')
    assert load_text(str(path)).text == "one\u2028two\n\nthree"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n ", "is empty"),
        ("latin.txt", b"caf\xe9 au lait", r"is not UTF-8 \(byte 3\)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', "line 2, is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1, is not JSON: it is nested too deeply"),
        ("other.jsonl", b'{"body": "a"}', 'line 1, is not an object with a string "text"'),
        ("text.pdf", b"%PDF", "has suffix '.pdf'; allowed are .txt and .jsonl"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        load_text(str(path))
