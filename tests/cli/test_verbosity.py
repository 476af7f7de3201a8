"""``--quiet``, ``--verbose``, ``--version`` and NO_COLOR change what a command says, and never its result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import ernieq
from ernieq.cli import main
from tests.cli.quantizing import done, quantize, run
from tests.convert.conversions import file_hashes, write_words
from tests.tiny import write_tiny

pty = pytest.importorskip("pty", reason="a terminal is imitated by a pseudo-terminal of Unix")

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;[25])[;\d]*m")
QUICK = ("--max-tokens", "4", "--threads", "1", "--device", "cpu")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_words(tmp_path / "words.txt")
    return write_tiny(tmp_path / "source")


def generate(model: Path, *options: str) -> Result:
    result = run("generate", model, "w5 w6", *QUICK, *options)
    assert result.exit_code == 0, result.output
    return result


def test_quiet_leaves_the_result_and_nothing_else(source: Path) -> None:
    plain, quiet = generate(source), generate(source, "--quiet")
    assert "tokens/s" in plain.stderr
    assert (quiet.stdout, quiet.stderr) == (plain.stdout, "")
    assert generate(source, "-q").stderr == ""


def test_quiet_and_verbose_can_stand_before_the_command(source: Path) -> None:
    before = run("-q", "generate", source, "w5 w6", *QUICK)
    assert (before.stdout, before.stderr) == (generate(source).stdout, "")
    assert "kernels: " in run("--verbose", "generate", source, "w5 w6", *QUICK).stderr


def test_verbose_says_which_kernels_run(source: Path) -> None:
    assert "kernels: " not in generate(source).stderr
    assert "kernels: scalar on the CPU, 1 threads" in generate(source, "-v", "--backend", "scalar").stderr


@pytest.mark.parametrize("arguments", [["-q", "-v", "env"], ["env", "-q", "-v"], ["-q", "env", "-v"]])
def test_quiet_and_verbose_together_are_refused(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--quiet and --verbose can't both be met" in result.stderr


def test_quiet_errors_are_still_told() -> None:
    result = run("verify", "nowhere", "-q")
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)


def test_a_piped_conversion_tells_of_its_layers_only_if_verbose(source: Path, tmp_path: Path) -> None:
    plain = quantize(source, tmp_path / "plain")
    verbose = quantize(source, tmp_path / "verbose", "-v")
    quiet = quantize(source, tmp_path / "quiet", "-q", "--tune", "--windows", "1")
    assert "wrote " in done(plain)
    assert plain.stderr == ""
    assert done(verbose).startswith("wrote ")
    for words in (
        r"layer 3/3: weight error 0\.\d+, output error 0\.\d+, tokens per expert \d+ to \d+",
        r"  self_attn\.q_proj: weight error 0\.\d{4}",
        r"embedding",
        r"writing and verifying",
    ):
        assert re.search(f"^{words}$", verbose.stderr, flags=re.MULTILINE), verbose.stderr
    assert quiet.stderr.startswith("not tuned: ")  # what changes the result is told all the same
    assert quiet.stderr.count("\n") == 1
    plain_files, verbose_files = file_hashes(tmp_path / "plain"), file_hashes(tmp_path / "verbose")
    assert plain_files["model.safetensors"] == verbose_files["model.safetensors"]


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """All that a command writes to a terminal of 100 columns."""
    screen, terminal = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    settings = {"TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "ernieq.cli", *arguments],
        stdout=terminal,
        stderr=terminal,
        env={**inherited, **settings},
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # what Linux says when the other side is closed
            part = b""
        if not part:
            break
        shown += part
    os.close(screen)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_no_color_takes_colours_off_a_terminal_and_leaves_the_bar(source: Path, tmp_path: Path) -> None:
    words = str(source.parent / "words.txt")
    command = [
        "quantize",
        str(source),
        "--text",
        words,
        "--state-bits",
        "12",
        "--windows",
        "2",
        "--window",
        "32",
    ]
    command += ["--threads", "1", "--device", "cpu"]
    coloured = on_a_terminal(*command, "--out", str(tmp_path / "a"))
    plain = on_a_terminal(*command, "--out", str(tmp_path / "b"), NO_COLOR="1")
    assert COLOUR.search(coloured)
    assert not COLOUR.search(plain)
    for shown in (coloured, plain):
        assert "layer 3/3: weight error" in shown
        assert "%" in shown
        assert "weights/s" in shown
    quiet = on_a_terminal(*command, "--out", str(tmp_path / "c"), "--quiet")
    assert quiet.count("\n") == 1
    assert quiet.startswith("wrote ")


def test_the_version_is_printed_and_nothing_is_run() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"ernieq, version {ernieq.__version__}\n")
