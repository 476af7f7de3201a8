"""The command, on a tiny stream in place of a loaded checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from ernieq.bundled import bundled_model
from ernieq.cli.eval_ppl import command
from ernieq.errors import ErnieqError, TextError, UsageError
from ernieq.kernels.backend import Backend

VOCAB = 16384  # of the bundled tokenizer


@dataclass
class Opened:
    """What the command asked to be opened, and what it will get."""

    streams: dict[str, Any]
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def open_stream(self, source: str | Path, **options: Any) -> Any:
        self.calls.append((str(source), options))
        return self.streams[Path(source).name]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, make_stream: Any) -> Opened:
    streams = {
        "tiny": make_stream(vocab=VOCAB),
        "tiny-2bit": make_stream(vocab=VOCAB, noise=0.05),
        "ernieq-nano": make_stream(vocab=VOCAB),
        "long": make_stream(vocab=VOCAB, positions=4096),
    }
    for name, stream in streams.items():
        stream.tokenizer_directory = bundled_model()
        stream.base = "bundled:ernieq-nano" if name == "tiny-2bit" else None
        sizes = {
            "total": 1000,
            "decoder": 800,
            "parameters": 2000,
            "quantized": 250,
            "quantized_parameters": 1000,
        }
        stream.weight_bytes = lambda sizes=sizes: sizes
    result = Opened(streams)
    module = ModuleType("ernieq.load")
    module.open_stream = result.open_stream  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ernieq.load", module)
    return result


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "house.txt"
    path.write_text("The old house stood upon a hill, and nobody had lived in it for years. " * 30)
    return str(path)


def run(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments, "--json", "--threads", "1")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=True)


def test_the_base_of_a_packed_checkpoint_comes_from_its_manifest(opened: Opened, text: str) -> None:
    found = run("tiny-2bit", "--text", text)
    assert found["base"] == str(bundled_model())
    assert found["texts"][0]["divergence"]["mean_kl"] > 0
    assert len(found["texts"][0]["routing"]) == 2


def test_base_none_measures_without_a_base(opened: Opened, text: str) -> None:
    found = run("tiny-2bit", "--base", "none", "--text", text)
    assert found["base"] is None
    assert found["texts"][0]["divergence"] is None
    assert [name for name, _ in opened.calls] == ["tiny-2bit"]


def test_base_names_another_model(opened: Opened, text: str) -> None:
    assert run("tiny-2bit", "--base", "tiny", "--text", text)["base"] == "tiny"


def test_a_missing_base_is_said_and_passed_over(opened: Opened, text: str) -> None:
    opened.streams["tiny-2bit"].base = "baidu/ERNIE-4.5-21B-A3B-Base-PT"
    result = invoke("tiny-2bit", "--text", text, "--json")
    assert result.exit_code == 0
    assert "baidu/ERNIE-4.5-21B-A3B-Base-PT is not on this machine" in result.stderr
    assert json.loads(result.stdout)["texts"][0]["base"] is None


def test_the_noise_floor_is_the_bases_own_divergence_in_bfloat16(opened: Opened, text: str) -> None:
    found = run("tiny-2bit", "--base", "tiny", "--text", text, "--noise-floor")
    assert opened.calls[-1] == ("tiny", opened.calls[1][1] | {"dtype": torch.bfloat16})
    noise = found["texts"][0]["noise"]
    assert noise["mean_kl"] == pytest.approx(0, abs=1e-9)  # the imagined stream of the base is float32 again
    assert run("tiny-2bit", "--base", "tiny", "--text", text)["texts"][0]["noise"] is None


def test_a_noise_floor_without_a_base_is_refused(opened: Opened, text: str) -> None:
    result = invoke("tiny-2bit", "--base", "none", "--text", text, "--noise-floor")
    assert isinstance(result.exception, UsageError)
    assert "pass --base" in str(result.exception)


def test_every_text_is_measured_and_all_bundled_ones_by_default(opened: Opened, text: str) -> None:
    found = run("tiny", "--text", text, "--text", "wikitext2", "--max-windows", "2")
    assert [record["text"]["name"] for record in found["texts"]] == [text, "wikitext2"]
    default = run("tiny", "--max-windows", "1", "--max-bytes", "2000")
    assert [record["text"]["name"] for record in default["texts"]] == ["english_books", "wikitext2"]


def test_the_protocol_decides_what_is_scored_and_is_in_the_result(opened: Opened, text: str) -> None:
    whole = run("tiny", "--text", text, "--window", "32")
    half = run("tiny", "--text", text, "--window", "32", "--protocol", "llama.cpp")
    assert (whole["protocol"], half["protocol"]) == ("gptq", "llama.cpp")
    windows = whole["texts"][0]["text"]["windows"]
    assert whole["texts"][0]["text"]["scored_tokens"] == 31 * windows
    assert half["texts"][0]["text"]["scored_tokens"] == 15 * windows


def test_the_default_window_is_2048_or_the_models_positions_if_fewer(opened: Opened) -> None:
    options = ("--text", "wikitext2", "--max-bytes", "12000", "--max-windows", "1")
    assert run("tiny", *options)["texts"][0]["text"]["window"] == 64
    assert run("long", *options)["texts"][0]["text"]["window"] == 2048


def test_windows_bytes_and_seed_are_obeyed(opened: Opened, text: str) -> None:
    few = run("tiny-2bit", "--text", text, "--max-windows", "3", "--max-bytes", "1500")
    assert few["texts"][0]["text"]["windows"] == 3
    assert few["texts"][0]["text"]["text_bytes"] == 1500
    first, second = (run("tiny-2bit", "--text", text, "--seed", seed)["texts"][0] for seed in ("1", "2"))
    assert first["divergence"]["kl_interval"] != second["divergence"]["kl_interval"]
    assert first["divergence"]["mean_kl"] == second["divergence"]["mean_kl"]


def test_threads_and_backend_reach_the_loader_and_torch(opened: Opened, text: str) -> None:
    invoke("tiny", "--text", text, "--threads", "1", "--backend", "reference")
    cpu = torch.device("cpu")  # even where there is a GPU: the backend is one of the CPU's
    assert opened.calls[0][1] == {"backend": Backend.REFERENCE, "threads": 1, "device": cpu}
    assert torch.get_num_threads() == 1


def test_batch_is_the_number_of_windows_per_step(
    opened: Opened, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    stream = opened.streams["tiny"]
    embed = stream.embed

    def counting(token_ids: torch.Tensor) -> Any:
        sizes.append(len(token_ids))
        return embed(token_ids)

    monkeypatch.setattr(stream, "embed", counting)
    run("tiny", "--text", text, "--max-windows", "5", "--batch", "2")
    assert sizes == [2, 2, 1]


def test_the_json_object_holds_text_hash_sizes_and_versions(opened: Opened, text: str) -> None:
    found = run("tiny-2bit", "--text", text)
    assert len(found["texts"][0]["text"]["sha256"]) == 64
    assert found["weights"]["bits_per_weight"] == 4.0
    assert found["weights"]["quantized_bits_per_weight"] == 2.0
    assert {"ernieq", "torch", "transformers", "python"} <= set(found["versions"])
    assert found["seconds"] > 0


def test_the_table_shows_protocol_sizes_and_both_models(opened: Opened, text: str) -> None:
    result = invoke("tiny-2bit", "--text", text, "--threads", "1")
    assert result.exit_code == 0
    for piece in ("protocol gptq", "windows of 64", "ernieq-nano", "tiny-2bit", "KL, nats", "1,000 B", "4.00"):
        assert piece in result.stdout
    assert result.stderr == "", "progress is quiet where there is no terminal"


def test_the_help_names_an_example_that_the_command_takes() -> None:
    context = click.Context(command)
    example = command.get_help(context).split("Example:")[1].split("\n")[1].split()
    assert example[:2] == ["ernieq", "eval-ppl"]
    command.make_context("eval-ppl", example[2:])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--text", "prose"), TextError, "known names: english_books, wikitext2"),
        (
            ("--text", "wikitext2", "--window", "65"),
            UsageError,
            "window is 65 tokens; the model has 64 positions",
        ),
        (("--text", "wikitext2", "--max-bytes", "40"), TextError, "one window of 64 is needed"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    opened: Opened, arguments: tuple[str, ...], error: type[ErnieqError], message: str
) -> None:
    result = invoke("tiny", *arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
