"""``ernieq bench`` on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ernieq.cli import main
from ernieq.runtime import speed
from tests.pack.packed_model import pack_model, source_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    pack_model(source_model(directory / "source"), directory / "packed")
    return directory / "packed"


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_COPIED_BYTES", {"cuda": 1 << 20, "cpu": 1 << 20})


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        main, ["bench", *map(str, arguments), "--device", "cpu", "--threads", "1", "--tokens", "4"]
    )


def test_each_prompt_length_has_its_figures(packed: Path) -> None:
    result = run(packed, "--prompt", "3,9", "--batch", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["device"], found["engine"], found["batch"], found["context"]) == ("cpu", "forward", 2, 13)
    assert [row["prompt"] for row in found["rows"]] == [3, 9]
    for row in found["rows"]:
        assert row["decode_tokens_per_second"] == pytest.approx(2 / row["step_milliseconds"] * 1e3)
        assert row["prefill_tokens_per_second"] > 0
        expected = row["step_bytes"] / (row["step_milliseconds"] / 1e3) / found["copy_bytes_per_second"]
        assert row["bandwidth_share"] == pytest.approx(expected)
    assert found["rows"][1]["step_bytes"] > found["rows"][0]["step_bytes"]  # more keys and values
    assert found["peak_gpu_bytes"] is None


def test_the_table_names_rates_and_bandwidth(packed: Path) -> None:
    output = run(packed, "--prompt", "4").stdout
    for words in ("prefill", "decode", "tokens/s", "ms", "of copying", "GB/s"):
        assert words in output


def test_prompts_that_no_position_is_left_for_are_not_measured_unasked(packed: Path) -> None:
    assert [row["prompt"] for row in json.loads(run(packed, "--json").stdout)["rows"]] == [124]


def test_an_ordinary_checkpoint_is_measured_too(packed: Path) -> None:
    result = run(packed.parent / "source", "--prompt", "4", "--json")
    assert json.loads(result.stdout)["rows"][0]["step_bytes"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "8", "--context", "10"], "--context is 10; a prompt of 8 and 4 tokens need 12"),
        (["--prompt", "127"], "131 tokens are asked for"),
        (["--prompt", "12,x"], "no list of positive numbers"),
        (["--prompt", "0"], "no list of positive numbers"),
    ],
)
def test_what_can_t_be_measured_is_refused_in_one_sentence(
    packed: Path, options: list[str], words: str
) -> None:
    result = run(packed, *options)
    assert result.exit_code == 2
    assert words in result.stderr
