"""Calibration texts: what is read, what is refused, how windows are cut."""

import json
from pathlib import Path

import pytest
import torch

from ernieq.calibrate import CalibrationSample, TextFile, read_text_file, sample_windows
from ernieq.errors import TextError


class Letters:
    """A tokenizer with one token a letter; 1 begins and 2 ends a document."""

    bos_token_id = 1
    eos_token_id = 2

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def texts(tmp_path: Path) -> list[TextFile]:
    lines = "\n".join(json.dumps({"text": letter * 7}) for letter in "abcdefgh")
    return [
        read_text_file(write(tmp_path / "a.jsonl", lines + "\n")),
        read_text_file(write(tmp_path / "b.txt", "z" * 40)),
    ]


def sample(files: list[TextFile], windows: int = 100, length: int = 16, seed: int = 0) -> CalibrationSample:
    return sample_windows(files, Letters(), windows=windows, length=length, seed=seed)


def test_windows_are_consecutive_pieces_of_delimited_documents(tmp_path: Path) -> None:
    drawn = sample(texts(tmp_path))
    assert drawn.windows.shape == ((8 * 9 + 42) // 16, 16)
    stream = drawn.windows.flatten().tolist()
    assert stream[0] == 1
    for place, token in enumerate(stream[:-1]):
        if token == 2:
            assert stream[place + 1] == 1
    assert drawn.tokens == len(stream)


def test_no_more_windows_than_asked_for_and_the_seed_decides_the_order(tmp_path: Path) -> None:
    files = texts(tmp_path)
    assert sample(files, windows=2).windows.shape == (2, 16)
    assert torch.equal(sample(files, seed=3).windows, sample(files, seed=3).windows)
    assert not torch.equal(sample(files, seed=3).windows, sample(files, seed=4).windows)


def test_the_hash_of_every_file_is_recorded(tmp_path: Path) -> None:
    import hashlib

    path = write(tmp_path / "t.txt", "hello " * 30)
    drawn = sample([read_text_file(path)])
    assert drawn.files == ((str(path), hashlib.sha256(path.read_bytes()).hexdigest()),)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2"),
        ("other.jsonl", b'{"body": "a"}', "line 1"),
        ("number.jsonl", b'{"text": 3}', "is not a string"),
        ("deep.jsonl", b"[" * 100000, "line 1"),
    ],
)
def test_a_bad_text_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=sentence) as caught:
        read_text_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.txt can't be read"):
        read_text_file(tmp_path / "nowhere.txt")


def test_a_text_shorter_than_one_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"has 42 tokens; at least one window of 64"):
        sample([read_text_file(write(tmp_path / "b.txt", "z" * 40))], length=64)
