"""``inspect``, ``verify`` and ``export`` on a packed and an ordinary checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ernieq.cli import main
from tests.pack.packed_model import pack_model, source_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("commands")
    pack_model(source_model(directory / "source"), directory / "packed")
    return directory / "packed"


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_accounts_for_every_stored_byte_of_a_packed_checkpoint(packed: Path) -> None:
    found = json.loads(run("inspect", packed, "--json"))
    assert found["packed"]
    assert found["file_bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in packed.glob("*.safetensors"))
    assert sum(group["nbytes"] for group in found["groups"]) == found["file_bytes"] - headers
    by_name = {group["name"]: group for group in found["groups"]}
    assert by_name["routed experts"]["tensors"] == 2 * 4 * 3
    assert by_name["routed experts"]["parameters"] == 2 * 4 * 3 * 32 * 48
    assert by_name["carried"]["tensors"] == 1
    assert found["decoder_bytes"] == sum(
        group["nbytes"] for group in found["groups"] if group["name"] not in ("embedding", "head", "carried")
    )


def test_inspect_counts_the_same_parameters_before_and_after_packing(packed: Path) -> None:
    plain = json.loads(run("inspect", packed.parent / "source", "--json"))
    found = json.loads(run("inspect", packed, "--json"))
    assert not plain["packed"]
    assert plain["quantized_parameters"] == 0
    assert plain["parameters"] == found["parameters"] - 2  # the two carried numbers were added in packing


def test_inspect_prints_a_row_for_each_group(packed: Path) -> None:
    output = run("inspect", packed)
    for words in ("routed experts", "shared experts", "attention", "dense MLP", "embedding", "router", "norms"):
        assert words in output
    assert "trellis K=" in output
    assert "tied to the embedding" in output


def test_verify_says_in_one_sentence_that_a_good_checkpoint_is_whole(packed: Path) -> None:
    output = run("verify", packed)
    assert "is whole" in output
    assert output.count("\n") == 1
    assert json.loads(run("verify", packed, "--json"))["carried"] == 1


def test_verify_refuses_a_damaged_checkpoint_with_its_own_exit_code(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in packed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = next(iter(sorted(copy.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    result = CliRunner().invoke(main, ["verify", str(copy)])
    assert result.exit_code == 6
    assert shard.name in result.output


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_path_that_is_missing_is_refused_in_one_sentence(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(main, [command, str(tmp_path / "missing")])
    assert result.exit_code not in (0, 70)
    assert "missing" in result.output


def test_export_writes_a_checkpoint_that_inspect_reads(packed: Path, tmp_path: Path) -> None:
    run("export", packed, "--to", "bf16", "--out", tmp_path / "plain", "--threads", "1")
    assert not json.loads(run("inspect", tmp_path / "plain", "--json"))["packed"]


def test_export_goes_beside_where_it_is_called_unless_told_otherwise(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("export", packed, "--to", "bf16", "--threads", "1")
    assert (tmp_path / f"{packed.name}-bf16" / "config.json").is_file()


def test_export_of_an_ordinary_checkpoint_is_refused(packed: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["export", str(packed.parent / "source"), "--out", str(tmp_path / "plain")]
    )
    assert result.exit_code == 6
    assert "not a packed checkpoint" in result.output
