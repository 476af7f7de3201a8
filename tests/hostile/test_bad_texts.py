"""Recipes, calibration texts, kept Hessians and tokenizers that are broken or made to do harm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernieq.calibrate import read_text_file
from ernieq.checkpoint import load_tokenizer, open_checkpoint
from ernieq.convert import HessianDirectory
from ernieq.convert.recipe import read_recipe
from ernieq.errors import CheckpointError, RecipeError, TextError
from tests.hostile.bad_files import JSON_BOMBS, NO_FILES
from tests.hostile.refusal import refusal
from tests.tiny import write_tiny

RECIPES: dict[str, bytes] = {
    "no TOML": b"bits = = 2",
    "no UTF-8": b"bits = 2 # \xff",
    "a key twice": b"bits = 2\nbits = 3",
    "an unknown key": b"colour = 3",
    "a long unknown key": b'"' + b"x" * 100_000 + b'" = 3',
    "a key that a terminal obeys": b'"\\u001b[2J" = 3',
    "lists a thousand deep": b"bits = " + b"[" * 1000 + b"]" * 1000,
    "lists a hundred thousand deep": b"bits = " + b"[" * 100_000,
    "an integer of 5000 digits": b"bits = " + b"9" * 5000,
    "bits infinite": b"bits = inf",
    "bits not a number": b"bits = nan",
    "bits a boolean": b"bits = true",
    "bits outside": b"bits = 9",
    "bits of a part outside": b"[parts]\nattention = 9",
    "bits of a module outside": b'[modules]\n"*" = 0',
    "bits of a module infinite": b'[modules]\n"*" = inf',
    "parts a number": b"parts = 3",
    "parts a list": b"parts = [1]",
    "modules a text": b'modules = "x"',
    "encode a list of tables": b"[[encode]]\ndamping = 1",
    "the router": b"[parts]\nrouter = 2",
    "damping infinite": b"[encode]\ndamping = inf",
    "damping not a number": b"[encode]\ndamping = nan",
    "damping negative": b"[encode]\ndamping = -1",
    "windows gigantic": b"[calibration]\nwindows = 1" + b"0" * 30,
    "windows a fraction": b"[calibration]\nwindows = 1.5",
    "seed a text": b'seed = "x"',
    "seed negative": b"seed = -1",
    "seed beyond 64 bits": b"seed = 18446744073709551616",
    "seed a boolean": b"seed = true",
    "enabled a number": b"[tune]\nenabled = 1",
    "too large": b"#" * (1 << 20) + b"\n",
}


@pytest.mark.parametrize("content", RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    message = refusal(lambda: read_recipe(tmp_path / "recipe.toml", None), RecipeError)
    assert "recipe.toml" in message or "--bits" in message


LINES: dict[str, bytes] = {
    "nothing": b"",
    "only spaces": b"  \n \n",
    "no UTF-8": b'{"text": "\xff"}',
    "no object": b"[1]",
    "no JSON": b"text",
    "no text": b'{"other": "x"}',
    "text a number": b'{"text": 1}',
    "text null": b'{"text": null}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "a number of 5000 digits": b'{"text": "x", "a": ' + b"9" * 5000 + b"}",
    "lists two million deep": b'{"text": ' + b"[" * 2_000_000,
}


@pytest.mark.parametrize("content", LINES.values(), ids=LINES)
def test_a_bad_calibration_text_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "texts.jsonl").write_bytes(content)
    refusal(lambda: read_text_file(tmp_path / "texts.jsonl"), TextError, r"texts\.jsonl")


def test_a_line_ends_with_a_line_feed_and_nothing_else(tmp_path: Path) -> None:
    """JSON allows separators of lines and paragraphs inside a string."""
    (tmp_path / "texts.jsonl").write_text(
        '{"text": "one\u2028two\u0085three"}\r\n{"text": "four"}\n', encoding="utf-8"
    )
    assert read_text_file(tmp_path / "texts.jsonl").documents == ("one\u2028two\u0085three", "four")


def read_no_more_than_the_summary(path: Path) -> object:
    return HessianDirectory(path.parent).record


ONE_FILE: dict[str, tuple[str, Callable[[Path], object], type[Exception]]] = {
    "recipe": ("recipe.toml", lambda path: read_recipe(path, None), RecipeError),
    "text": ("text.txt", read_text_file, TextError),
    "lines": ("texts.jsonl", read_text_file, TextError),
    "summary": ("calibration.json", read_no_more_than_the_summary, CheckpointError),
    "Hessians": (
        "layer-00000.safetensors",
        lambda path: HessianDirectory(path.parent).read_layer(0),
        CheckpointError,
    ),
}


@pytest.mark.parametrize("kind", ONE_FILE)
@pytest.mark.parametrize("what", [what for what in NO_FILES if what != "a link out of the directory"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, what: str) -> None:
    name, read, error = ONE_FILE[kind]
    NO_FILES[what](tmp_path / name)
    refusal(lambda: read(tmp_path / name), error, name.replace(".", r"\."))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["text", "lines"])
def test_a_text_of_a_terabyte_is_refused_unread(tmp_path: Path, kind: str) -> None:
    name = ONE_FILE[kind][0]
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**40)
    refusal(lambda: read_text_file(tmp_path / name), TextError, "at most 268435456 are allowed")


@pytest.mark.parametrize("text", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_a_bad_summary_of_kept_hessians_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "calibration.json").write_bytes(text)
    refusal(
        lambda: HessianDirectory(tmp_path).record,
        CheckpointError,
        "is no finished output of ernieq calibrate",
        most_bytes=200_000_000,
    )


@pytest.mark.parametrize(
    "record",
    ["null", "[]", "{}", '{"files": {}, "tokens": "many", "windows": 1, "seed": 0}',
     '{"files": {"a": "short"}, "tokens": 1, "windows": 1, "seed": 0}',
     '{"files": {}, "tokens": true, "windows": 1, "seed": 0}'],
)  # fmt: skip
def test_a_summary_of_other_fields_is_refused(tmp_path: Path, record: str) -> None:
    (tmp_path / "calibration.json").write_text(f'{{"calibration": {record}}}')
    refusal(lambda: HessianDirectory(tmp_path).record, CheckpointError, "is no finished output")


@pytest.mark.parametrize("raw", [b"", b"x" * 7, (1 << 63).to_bytes(8, "little"), b"\x02" + bytes(7) + b"{}x"])
def test_bad_hessians_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "layer-00000.safetensors").write_bytes(raw)
    refusal(lambda: HessianDirectory(tmp_path).read_layer(0), CheckpointError, "layer-00000")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("what", [what for what in NO_FILES if what != "a directory"])
def test_a_tokenizer_that_is_no_file_of_the_checkpoint_is_refused(tmp_path: Path, name: str, what: str) -> None:
    """It would be waited for, or a file of the user's be copied into what is published."""
    directory = write_tiny(tmp_path / "checkpoint")
    (directory / name).rename(tmp_path / f"moved-{name}")
    NO_FILES[what](directory / name)
    refusal(lambda: load_tokenizer(directory), CheckpointError, name.replace(".", r"\."))
    checkpoint = open_checkpoint(directory)
    refusal(checkpoint.aux_files, CheckpointError, name.replace(".", r"\."))


def test_hessians_that_are_legal_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.eye(4)}, tmp_path / "layer-00000.safetensors")
    assert torch.equal(HessianDirectory(tmp_path).read_layer(0)["a"], torch.eye(4))
