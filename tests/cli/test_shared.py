"""The group loads commands late and speaks in sentences; the shared options mean the same everywhere."""

from __future__ import annotations

import errno
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from ernieq import errors
from ernieq.cli import main, shared
from ernieq.cli.group import CommandEntry, CommandSection, ErnieqGroup
from ernieq.kernels.backend import Backend


def run_raising(error: BaseException, *options: str) -> Result:
    """Call a command that raises an error through a group like ours."""

    def fail() -> None:
        raise error

    return run_body(fail, *options)


def run_body(body: Callable[[], Any], *options: str) -> Result:
    class OneCommandGroup(ErnieqGroup):
        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
            return click.Command(cmd_name, callback=body)

    debug = click.Option(["--debug"], is_flag=True)
    group = OneCommandGroup("ernieq", sections=(), params=[debug], callback=lambda debug: None)
    return CliRunner().invoke(group, [*options, "work"])


def run_option(option: Callable[..., Any], *arguments: str) -> Result:
    """Call a command that prints the values it was given as JSON."""

    @click.command()
    @option
    def command(**values: Any) -> None:
        click.echo(json.dumps(values))

    return CliRunner().invoke(command, list(arguments))


def test_help_is_printed_without_torch_or_transformers() -> None:
    script = (
        "import sys, click.testing, ernieq.cli\n"
        "result = click.testing.CliRunner().invoke(ernieq.cli.main, ['--help'])\n"
        "assert result.exit_code == 0 and 'quantize' in result.output, result.output\n"
        "print([name for name in ('torch', 'transformers', 'scipy', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_help_lists_every_command_under_its_heading() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for section in main.sections:
        block = output.split(f"{section.title}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in block.splitlines()] == [entry.name for entry in section.entries]


@pytest.mark.parametrize("name", main.list_commands(click.Context(main)))
def test_every_command_has_a_help_text_with_an_example(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"ernieq {name}" in result.output.split("Usage:")[1].split("\n", 1)[1]
    assert "\\b" not in result.output  # click's mark for "do not re-wrap" is the character, not its escape


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["shrink"])
    assert result.exit_code == 2
    assert "No such command 'shrink'" in result.stderr


def test_a_command_is_looked_up_in_the_file_of_its_name() -> None:
    assert CommandEntry("eval-ppl", "").module == "ernieq.cli.eval_ppl"
    group = ErnieqGroup("ernieq", sections=(CommandSection("Make", (CommandEntry("shared", ""),)),))
    assert group.get_command(click.Context(group), "not-listed") is None


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.CheckpointError("shard a.safetensors is truncated"), 3),
        (errors.OutputExistsError("out exists"), 2),
        (errors.FormatError("bad"), 6),
    ],
)
def test_an_expected_error_is_one_sentence_on_stderr_and_its_exit_code(
    error: errors.ErnieqError, exit_code: int
) -> None:
    result = run_raising(error)
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", f"Error: {error}\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "not permitted")],
)
def test_a_failing_disk_is_a_storage_error_that_names_the_file(number: int, words: str) -> None:
    result = run_raising(OSError(number, "as the system says it", "out/model.safetensors"))
    assert result.exit_code == errors.StorageError.exit_code
    assert result.stderr.startswith("Error: out/model.safetensors: ")
    assert words in result.stderr


def test_an_interrupt_exits_as_a_shell_expects() -> None:
    result = run_raising(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr.startswith("Interrupted")


def test_an_internal_error_shows_its_traceback_only_with_debug() -> None:
    quiet = run_raising(ZeroDivisionError("a\nb"))
    assert quiet.exit_code == 70
    assert quiet.stderr.count("\n") == 1
    assert "ZeroDivisionError: a;" in quiet.stderr
    assert "--debug" in quiet.stderr
    assert isinstance(run_raising(ZeroDivisionError("a"), "--debug").exception, ZeroDivisionError)


def test_an_expected_error_is_raised_on_with_debug() -> None:
    assert isinstance(run_raising(errors.TextError("no text"), "--debug").exception, errors.TextError)


def test_clicks_own_errors_keep_their_form() -> None:
    result = run_raising(click.BadParameter("no such file"))
    assert result.exit_code == 2
    assert "Invalid value: no such file" in result.stderr


def test_threads_default_to_all_processors_and_are_at_least_one() -> None:
    assert json.loads(run_option(shared.threads_option).stdout)["threads"] >= 1
    assert json.loads(run_option(shared.threads_option, "--threads", "3").stdout) == {"threads": 3}
    assert run_option(shared.threads_option, "--threads", "0").exit_code == 2


def test_a_backend_is_one_of_those_that_exist() -> None:
    assert json.loads(run_option(shared.backend_option).stdout) == {"backend": Backend.AUTO}
    assert json.loads(run_option(shared.backend_option, "--backend", "scalar").stdout) == {
        "backend": Backend.SCALAR
    }
    assert "'avx512'" in run_option(shared.backend_option, "--backend", "mmx").stderr


@pytest.mark.parametrize(
    ("option", "flag", "name"),
    [(shared.json_option, "--json", "as_json"), (shared.overwrite_option, "--overwrite", "overwrite")],
)
def test_flags_are_off_until_given(option: Callable[..., Any], flag: str, name: str) -> None:
    assert json.loads(run_option(option).stdout) == {name: False}
    assert json.loads(run_option(option, flag).stdout) == {name: True}


def test_a_seed_is_zero_until_given_and_never_negative() -> None:
    assert json.loads(run_option(shared.seed_option).stdout) == {"seed": 0}
    assert run_option(shared.seed_option, "--seed", "-1").exit_code == 2


def test_json_keeps_every_script_readable(capsys: pytest.CaptureFixture[str]) -> None:
    shared.print_json({"text": "洛阳"})
    assert "洛阳" in capsys.readouterr().out


def report_work(*, terminal: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with shared.progress_report("encoding", total=2, unit="layers", console=console) as report:
        report.advance()
        report.line("layer 0: [error] 0.07")
        report.update("checking", 3, 4)
        report.describe("writing")
    return screen.getvalue()


@pytest.mark.parametrize(("unit", "rate"), [("bytes", r"[0-9.]+ [kMG]?B/s"), ("layers", r"layers/s")])
def test_on_a_terminal_the_rate_is_shown_in_its_unit(unit: str, rate: str) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with shared.progress_report("verify", total=1e7, unit=unit, console=console) as report:
        report.update("verify", 1e6, 1e7)
        time.sleep(0.02)
        report.update("verify", 3e6, 1e7)
        report.terminal_line("all at 3 GB/s")
    assert re.search(rate, screen.getvalue())
    assert "all at 3 GB/s" in screen.getvalue()


def test_what_is_for_a_terminal_is_not_printed_elsewhere() -> None:
    screen = io.StringIO()
    with shared.progress_report("verify", console=Console(file=screen, force_terminal=False)) as report:
        report.terminal_line("all at 3 GB/s")
    assert screen.getvalue() == ""


def test_away_from_a_terminal_only_the_lines_are_printed() -> None:
    assert report_work(terminal=False) == "layer 0: [error] 0.07\n"


def test_on_a_terminal_a_bar_is_drawn_beside_the_lines() -> None:
    shown = report_work(terminal=True)
    assert "layer 0: [error] 0.07" in shown
    assert "writing" in shown
    assert "75%" in shown
