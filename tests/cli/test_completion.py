"""``ernieq completion`` prints a script, and what the script asks for is answered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from ernieq.cli import main

START = "from ernieq.cli import main; main(prog_name='ernieq')"


def completions(words: str, index: int) -> list[str]:
    """What bash is told to offer for the word of this index."""
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(index), "_ERNIEQ_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return [line.removeprefix("plain,") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_in_the_language_of_its_shell(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell], prog_name="ernieq")
    assert result.exit_code == 0
    assert f"_ERNIEQ_COMPLETE={shell}_complete" in result.stdout
    if program := shutil.which(shell):
        checked = subprocess.run([program, "-n", "-"], input=result.stdout, text=True, check=False)
        assert checked.returncode == 0


def test_a_shell_without_completion_is_refused() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'fish'" in result.stderr


def test_commands_and_options_are_completed() -> None:
    assert completions("ernieq e", 1) == ["export", "eval-ppl", "env"]
    assert completions("ernieq --ver", 1) == ["--version", "--verbose"]
    assert completions("ernieq verify --j", 2) == ["--json"]


@pytest.mark.parametrize("command", ["generate", "bench", "eval-ppl", "quantize", "calibrate", "inspect"])
def test_the_shell_completes_the_directory_of_a_model(command: str) -> None:
    parameter = next(
        parameter
        for parameter in main.get_command(click.Context(main), command).params  # type: ignore[union-attr]
        if isinstance(parameter, click.Argument)
    )
    (item,) = parameter.shell_complete(click.Context(main), "ernieq-na")
    assert (item.value, item.type) == ("ernieq-na", "dir")


def test_the_name_of_a_command_is_completed_without_importing_it() -> None:
    script = (
        "import sys, click, ernieq.cli\n"
        "main = ernieq.cli.main\n"
        "names = [item.value for item in main.shell_complete(click.Context(main), 'qu')]\n"
        "assert names == ['quantize'], names\n"
        "print('torch' in sys.modules, 'ernieq.cli.quantize' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False False", "")
