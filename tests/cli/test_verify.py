"""``ernieq verify``: also without torch, also against the source."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ernieq.bundled import bundled_model, resolve_source
from ernieq.cli import main
from ernieq.pack import PackedReader
from tests.hostile.packed_damage import edit_json
from tests.pack.packed_model import pack_model, source_model

# What a machine that only verifies may lack; the kernels are compiled without any of it.
ABSENT = ("torch", "transformers", "tokenizers", "safetensors", "scipy", "huggingface_hub")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source, and a packed checkpoint of its shape that holds other numbers."""
    place = tmp_path_factory.mktemp("verify")
    pack_model(source_model(place / "source"), place / "packed")
    return place


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source and what ``quantize`` made of it."""
    from tests.convert.conversions import write_words
    from tests.tiny import write_tiny

    place = tmp_path_factory.mktemp("converted")
    write_tiny(place / "source", mtp=True)
    write_words(place / "words.txt")
    options = ["--state-bits", "12", "--window", "32", "--windows", "2", "--threads", "1"]
    result = run(
        "quantize", place / "source", "--text", place / "words.txt", "--out", place / "packed", *options
    )
    assert result.exit_code == 0, result.output
    return place


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
        "from ernieq.cli import main; main(sys.argv[1:], prog_name='ernieq')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_verify_runs_on_a_machine_without_torch(directory: Path) -> None:
    finished = run_without_torch("verify", directory / "packed")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "is whole" in finished.stdout


def test_verify_compares_with_the_source_on_a_machine_without_torch(converted: Path) -> None:
    finished = run_without_torch("verify", converted / "packed", "--source", converted / "source")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "relative error" in finished.stdout


def test_a_refusal_without_torch_is_one_sentence(directory: Path) -> None:
    finished = run_without_torch("verify", directory / "packed", "--source", directory / "source")
    assert finished.returncode == 6
    assert finished.stderr.startswith("Error: model.mtp_norm.0.weight is not in the source")
    assert finished.stderr.count("\n") == 1


def test_every_tensor_has_a_line_with_its_relative_error(converted: Path) -> None:
    result = run("verify", converted / "packed", "--source", converted / "source")
    assert result.exit_code == 0, result.output
    reader = PackedReader(converted / "packed")
    lines = result.stdout.splitlines()
    for module in reader.modules():
        (line,) = [line for line in lines if line.startswith(f"{module}.weight ")]
        assert f"  {reader.code_of(module).bits_per_weight:g} bits  relative error 0." in line
    for name in reader.tensors():
        assert any(line.startswith(f"{name}  ") and line.endswith("relative error 0") for line in lines)
    assert lines[-1].endswith(f"every tensor of {converted / 'source'} is there as it should be.")


def test_the_errors_fall_with_the_bits_and_do_not_depend_on_the_backend(converted: Path) -> None:
    arguments = ("verify", converted / "packed", "--source", converted / "source", "--json", "--backend")
    found = {name: json.loads(run(*arguments, name).stdout)["errors"] for name in ("auto", "reference")}
    for auto, reference in zip(found["auto"], found["reference"], strict=True):
        assert auto["name"] == reference["name"]
        assert auto["relative_error"] == pytest.approx(reference["relative_error"], rel=1e-4)
    means: dict[float, list[float]] = {}
    for error in found["auto"]:
        if error["bits"] is not None:
            means.setdefault(error["bits"], []).append(error["relative_error"])
    ordered = [sum(errors) / len(errors) for _, errors in sorted(means.items())]
    assert len(ordered) >= 3
    assert ordered == sorted(ordered, reverse=True)


def test_json_tells_what_was_read_and_how_long_it_took(directory: Path) -> None:
    found = json.loads(run("verify", directory / "packed", "--json").stdout)
    assert found["errors"] is None
    assert found["seconds"] > 0
    assert found["shard_bytes"] == sum(
        file.stat().st_size for file in (directory / "packed").glob("*.safetensors")
    )


def test_bundled_stands_for_the_bundled_model(directory: Path) -> None:
    assert resolve_source("bundled") == bundled_model()
    result = run("verify", directory / "packed", "--source", "bundled")
    assert result.exit_code == 6
    assert "of the source is missing" in result.stderr


def test_a_source_that_is_none_has_the_exit_code_of_a_source(directory: Path, tmp_path: Path) -> None:
    result = run("verify", directory / "packed", "--source", tmp_path / "nowhere")
    assert result.exit_code == 3
    assert "nowhere does not exist" in result.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 4}, "is missing: the configuration calls for it"),
        ({"hidden_size": 64}, "the configuration calls for"),
        ({"num_hidden_layers": 2}, "has no place in the model"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 1024, "moe_num_experts": 4096, "moe_layer_end_index": -1}, "experts in all"),
    ],
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(
    directory: Path, tmp_path: Path, change: dict[str, object], sentence: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (directory / "packed").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    edit_json(copy / "config.json", lambda config: config.update(change))
    result = run("verify", copy)
    assert result.exit_code == 6, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
