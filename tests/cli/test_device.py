"""``--device`` of the commands that run a model, on machines without a GPU and with one that is imagined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ernieq.cli import main

TinyFactory = Callable[..., Path]
COMMANDS = (
    ("generate", "w5 w6"),
    ("eval-ppl", "--base", "none"),
    ("bench", "--prompt", "4", "--tokens", "4"),
)


def invoke(command: tuple[str, ...], path: Path, *options: str) -> Result:
    name, *rest = command
    return CliRunner().invoke(main, [name, str(path), *rest, *options, "--threads", "1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("device", "exit_code", "message"),
    [
        ("cuda", 7, "device cuda can't be used"),
        ("cuda:3", 7, "device cuda:3 can't be used"),
        ("tpu", 2, "allowed are auto, cpu, cuda and cuda:N"),
        ("mps", 2, "allowed are auto, cpu, cuda and cuda:N"),
    ],
)
def test_a_device_that_can_t_be_used_is_refused_in_one_sentence(
    command: tuple[str, ...], device: str, exit_code: int, message: str, tiny: TinyFactory
) -> None:
    result = invoke(command, tiny(), "--device", device)
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().count("\n") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_auto_takes_the_cpu_where_there_is_no_gpu_and_says_nothing_of_it(tiny: TinyFactory) -> None:
    directory = tiny()
    options = ("--temperature", "0", "--max-tokens", "4")
    alone = invoke(COMMANDS[0], directory, *options)
    named = invoke(COMMANDS[0], directory, *options, "--device", "cpu")
    assert alone.exit_code == 0, alone.output
    assert alone.stdout == named.stdout
    assert "Running on" not in alone.stderr


@pytest.fixture
def imagined_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU that ``auto`` would take; loading is cut short and notes where it was told to load to."""
    seen: list[Any] = []

    def stop(_path: object, *, device: torch.device, **_options: object) -> None:
        seen.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr("ernieq.kernels.device.resolve_device", lambda _name: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _device: "Imagined 1")
    monkeypatch.setattr("ernieq.load.load_model", stop)
    monkeypatch.setattr("ernieq.load.open_stream", stop)
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_auto_says_which_gpu_it_took(
    command: tuple[str, ...], imagined_gpu: list[Any], tiny: TinyFactory
) -> None:
    result = invoke(command, tiny())
    assert imagined_gpu == [torch.device("cuda", 0)]
    assert result.stderr.startswith("Running on Imagined 1 (cuda:0).\n")
    assert "Running on" not in invoke(command, tiny(), "--device", "cuda").stderr


def test_json_is_not_told_which_gpu_it_is(imagined_gpu: list[Any], tiny: TinyFactory) -> None:
    assert "Running on" not in invoke(COMMANDS[1], tiny(), "--json").output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_backend_of_the_cpu_keeps_auto_off_the_gpu(
    command: tuple[str, ...], imagined_gpu: list[Any], tiny: TinyFactory
) -> None:
    invoke(command, tiny(), "--backend", "reference")
    assert imagined_gpu == [torch.device("cpu")]
