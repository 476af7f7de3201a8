"""``ernieq calibrate`` reports what experts saw, and keeps Hessians that quantize takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from tests.cli.quantizing import Untouched, done, quantize, refused, run
from tests.convert.conversions import file_hashes, write_words

SAMPLE = ["--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def source(tiny: Callable[..., Path]) -> Path:
    directory = tiny()
    write_words(directory.parent / "words.txt")
    return directory


@pytest.fixture
def hessians(source: Path, tmp_path: Path) -> Path:
    done(calibrate(source, "--out", tmp_path / "hessians"))
    return tmp_path / "hessians"


def calibrate(source: Path, *options: str | Path) -> Result:
    return run("calibrate", source, "--text", source.parent / "words.txt", *SAMPLE, *options)


def test_token_counts_add_up_and_trust_is_a_share(source: Path) -> None:
    found = json.loads(done(calibrate(source, "--json")))
    assert (found["calibration"]["tokens"], found["calibration"]["windows"]) == (128, 4)
    assert [sum(layer["expert_tokens"]) for layer in found["layers"]] == [0, 256, 256]
    for layer in found["layers"]:
        assert all(0 <= trust < 1 for trust in layer["expert_trust"])


def test_the_table_names_dense_layers_and_counts(source: Path) -> None:
    output = done(calibrate(source))
    assert "tokens in 4 windows" in " ".join(output.split())
    assert "dense" in output


def test_without_out_nothing_is_written(source: Path) -> None:
    before = Untouched(source.parent)
    done(calibrate(source))
    before.check()


def test_a_file_of_symmetric_hessians_is_kept_for_every_layer(hessians: Path) -> None:
    names = ["calibration.json", *(f"layer-{index:05d}.safetensors" for index in range(3))]
    assert sorted(path.name for path in hessians.iterdir()) == names
    for name in names[1:]:
        for gram in load_file(hessians / name).values():
            torch.testing.assert_close(gram, gram.T)
            assert float(torch.linalg.eigvalsh(gram.double()).min()) > -1e-4


def test_windows_text_and_seed_choose_the_sample(source: Path, tmp_path: Path, hessians: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"w3 w4 w{n}"}) + "\n" for n in range(5, 60)))
    other = run("calibrate", source, "--text", lines, *SAMPLE, "--seed", "3", "--out", tmp_path / "other")
    done(other)
    record = json.loads((tmp_path / "other" / "calibration.json").read_text())["calibration"]
    assert list(record["files"]) == ["lines.jsonl"]
    assert record["seed"] == 3
    first = "layer-00000.safetensors"
    assert file_hashes(tmp_path / "other")[first] != file_hashes(hessians)[first]


def test_an_existing_output_is_replaced_with_overwrite_alone(source: Path, hessians: Path) -> None:
    before = Untouched(hessians)
    refused(calibrate(source, "--out", hessians), 2, "hessians", "--overwrite")
    before.check()
    done(calibrate(source, "--out", hessians, "--overwrite", "--seed", "2"))
    assert json.loads((hessians / "calibration.json").read_text())["calibration"]["seed"] == 2


def test_a_short_text_is_refused_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w3 w4")
    before = Untouched(tmp_path)
    refused(run("calibrate", source, "--text", text, *SAMPLE, "--out", tmp_path / "out"), 4, "tokens")
    before.check()


def break_summary(hessians: Path) -> None:
    (hessians / "calibration.json").unlink()


def lose_a_layer(hessians: Path) -> None:
    (hessians / "layer-00001.safetensors").unlink()


def truncate_a_layer(hessians: Path) -> None:
    path = hessians / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def put_nan(hessians: Path) -> None:
    path = hessians / "layer-00001.safetensors"
    grams = load_file(path)
    grams["mlp.input"] = torch.full((32, 32), float("nan"))
    save_file(grams, path)


def lose_a_hessian(hessians: Path) -> None:
    path = hessians / "layer-00001.safetensors"
    grams = load_file(path)
    del grams["self_attn.context"]
    save_file(grams, path)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (break_summary, "calibration.json"),
        (lose_a_layer, "layer-00001"),
        (truncate_a_layer, "layer-00001"),
        (put_nan, "mlp.input"),
        (lose_a_hessian, "self_attn.context"),
    ],
)
def test_broken_hessians_are_refused_and_no_output_is_left(
    source: Path, tmp_path: Path, hessians: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(hessians)
    before = Untouched(tmp_path)
    refused(quantize(source, tmp_path / "packed", "--hessians", hessians), 3, name)
    before.check(unfinished=True)


def test_hessians_of_another_model_are_refused(
    tiny: Callable[..., Path], tmp_path: Path, hessians: Path
) -> None:
    other = tiny(hidden=48)
    refused(quantize(other, tmp_path / "packed", "--hessians", hessians), 3, "width 48")
    assert not (tmp_path / "packed").exists()
