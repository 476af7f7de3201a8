"""``ernieq import-wint2``: the result loads everywhere and holds exactly what the files stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import ernieq
from ernieq.cli import main
from tests.checkpoint.wint2_files import Wint2Files


@pytest.fixture(scope="module")
def files() -> Wint2Files:
    return Wint2Files()


@pytest.fixture(scope="module")
def source(files: Wint2Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("import") / "wint2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["import-wint2", *(str(argument) for argument in arguments)])


def test_transformers_loads_the_import_and_every_weight_is_equal(
    files: Wint2Files, source: Path, tmp_path: Path
) -> None:
    result = run(source, "--out", tmp_path / "plain", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tensors"] == len(files.meant)
    assert report["nbytes"] == sum(tensor.nbytes for tensor in files.meant.values())
    assert (report["stored"]["wint2"], report["input_order"]) == (24, "plain")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = model.state_dict()
    gate_up = state["model.layers.3.mlp.experts.gate_up_proj"]
    for expert in range(4):
        for row, part in ((0, "gate"), (1, "up")):
            meant = files.meant[f"model.layers.3.mlp.experts.{expert}.{part}_proj.weight"]
            assert torch.equal(gate_up[expert][128 * row : 128 * (row + 1)].bfloat16(), meant)
    tokens = torch.arange(3, 20)[None]
    ours = ernieq.load_model(tmp_path / "plain")(tokens)
    torch.testing.assert_close(ours, model.float()(tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_table_of_what_was_stored_is_told_on_the_way(source: Path, tmp_path: Path) -> None:
    result = run(source, "--out", tmp_path / "plain")
    assert result.exit_code == 0, result.output
    assert "24 2 bits (WINT2), 12 int4" in result.stderr
    assert "inputs in plain order" in result.stderr
    assert "tensors, " in result.stdout


def test_a_packed_import_is_whole_and_near_what_it_came_from(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 61 + 3}" for number in range(4000)))
    options = ("--to", "packed", "--bits", "4", "--threads", "1", "--device", "cpu")
    settings = ("--text", text, "--windows", "2", "--state-bits", "12")
    result = run(source, "--out", tmp_path / "packed", *options, *settings, "--json")
    assert result.exit_code == 0, result.output
    verified = CliRunner().invoke(main, ["verify", str(tmp_path / "packed"), "--json"])
    assert verified.exit_code == 0, verified.output
    assert run(source, "--out", tmp_path / "plain").exit_code == 0
    tokens = torch.arange(3, 40)[None]
    plain = ernieq.load_model(tmp_path / "plain")(tokens).log_softmax(-1)
    packed = ernieq.load_model(tmp_path / "packed")(tokens).log_softmax(-1)
    assert float((plain.exp() * (plain - packed)).sum(-1).mean()) < 0.1


def test_the_files_themselves_can_be_run_as_what_they_stand_for(source: Path, tmp_path: Path) -> None:
    assert run(source, "--out", tmp_path / "plain").exit_code == 0
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(ernieq.load_model(source)(tokens), ernieq.load_model(tmp_path / "plain")(tokens))


def test_input_order_changes_what_is_read(source: Path, tmp_path: Path) -> None:
    for order in ("plain", "kernel"):
        assert run(source, "--out", tmp_path / order, "--input-order", order).exit_code == 0
    weights = [(tmp_path / order / "model.safetensors").read_bytes() for order in ("plain", "kernel")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--bits", "2"), 2, "--bits means nothing without --to packed"),
        (("--windows", "2"), 2, "--windows means nothing without --to packed"),
        (("--revision", "main"), 2, "is of no use"),
        (("--to", "packed", "--bits", "9"), 2, "bits"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    source: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = run(source, "--out", tmp_path / "plain", *arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_input_and_an_existing_output_are_left_alone(source: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert run(source, "--out", source, "--overwrite").exit_code == 2
    assert run(source, "--out", source / "inside").exit_code == 2
    (tmp_path / "plain").mkdir()
    assert run(source, "--out", tmp_path / "plain").exit_code == 2
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
