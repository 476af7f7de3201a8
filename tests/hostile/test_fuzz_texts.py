"""Recipes, calibration texts and kept Hessians with changes drawn at random are refused or read correctly."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ernieq.calibrate import read_text_file
from ernieq.convert import HessianDirectory
from ernieq.convert.recipe import read_recipe, stated_parts
from ernieq.errors import CheckpointError, TextError, UsageError
from tests.hostile.fuzzing import read_or_refuse
from tests.hostile.mutations import TEXTS, damaged, json_texts

RECIPE = b"""bits = 2.5
seed = 3
[parts]
attention = 4
[modules]
"model.layers.0.*" = 5
[encode]
damping = 0.01
state_bits = 12
[calibration]
windows = 64
[tune]
enabled = true
learning_rate = 2e-3
"""
LINES = b'{"text": "The old house stood."}\n{"text": "On the hill.", "id": 7}\n\n'
SUMMARY = (
    b'{"calibration": {"files": {"a.txt": "'
    + b"0" * 64
    + b'"}, "tokens": 10, "windows": 2, "seed": 0}, "layers": 2}'
)

toml_values = st.sampled_from(
    [
        "inf",
        "nan",
        "-1",
        "0",
        "true",
        '"x"',
        "[]",
        "{}",
        "1e400",
        "9" * 400,
        "2",
        "1979-05-27",
        "[" * 2000,
        "1.5",
    ]
)
toml_keys = st.sampled_from(
    ["bits", "seed", "parts", "modules", "encode", "calibration", "tune", "encode.damping", "parts.attention",
     "tune.enabled", "calibration.windows", "encode.state_bits", "x", "a." * 2000 + "b", '"*' * 3 + '"']
)  # fmt: skip
toml_texts = st.lists(st.tuples(toml_keys, toml_values), max_size=4).map(
    lambda pairs: "\n".join(f"{key} = {value}" for key, value in pairs).encode()
)


@given(content=st.one_of(damaged(RECIPE), toml_texts))
def test_fuzz_a_recipe(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "recipe.toml"
        path.write_bytes(content)

        def read() -> None:
            recipe = read_recipe(path, None)
            stated_parts(path)
            assert recipe.to_dict()["parts"]

        read_or_refuse(read, UsageError)


@given(content=st.one_of(damaged(LINES), json_texts(LINES.splitlines()[1]), st.sampled_from(TEXTS).map(
    lambda text: b'{"text": "' + text.encode("utf-8", "surrogatepass") + b'"}')))  # fmt: skip
def test_fuzz_a_calibration_text(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "texts.jsonl"
        path.write_bytes(content)

        def read() -> None:
            for document in read_text_file(path).documents:
                document.encode("utf-8")

        read_or_refuse(read, TextError)


@given(content=json_texts(SUMMARY))
def test_fuzz_a_summary_of_kept_hessians(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "calibration.json").write_bytes(content)

        def read() -> None:
            record = HessianDirectory(Path(name)).record
            assert isinstance(record.tokens, int)
            assert all(isinstance(digest, str) for digest in record.files.values())

        read_or_refuse(read, CheckpointError)
