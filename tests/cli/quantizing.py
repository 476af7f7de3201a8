"""Runs ``ernieq quantize`` on small checkpoints, and states what every refusal must look like."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from ernieq.cli import main
from tests.convert.conversions import file_hashes

# Ten state bits are too few for the six bits that the default recipe gives embedding and head.
CODE = ["--state-bits", "10", "--embedding-bits", "5", "--head-bits", "5", "--threads", "1", "--device", "cpu"]
_TOLD = ("plan: ", "layer ")  # lines that a conversion prints before it fails
SAMPLE = ["--windows", "4", "--window", "32"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def quantize(source: Path, out: Path, *options: str | Path) -> Result:
    """Quantize quickly; later options override the quick ones. The text lies beside the source."""
    text: list[str | Path] = []
    if not {"--text", "--hessians"} & set(map(str, options)):
        text = ["--text", source.parent / "words.txt"]
    sample = [] if "--hessians" in options else SAMPLE  # drawn before, with stored Hessians
    return run("quantize", source, "--out", out, *text, *CODE, *sample, *options)


def done(result: Result) -> str:
    """The output on stdout of a command that must succeed."""
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Result, exit_code: int, *naming: str) -> str:
    """The one sentence of a command that must fail, with its exit code and what the sentence must name."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if not line.startswith(_TOLD)] == lines[-1:], result.stderr
    sentence = lines[-1]
    assert sentence.startswith("Error: ")
    assert "Traceback" not in result.stderr
    for words in naming:
        assert words in sentence
    return sentence


class Untouched:
    """A directory whose files must be the same afterwards, with nothing beside them."""

    # What a run that failed half way has finished stays, for the next one.
    UNFINISHED = "packed.partial"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._before = self._state()

    def check(self, *, unfinished: bool = False) -> None:
        """``unfinished``: finished work of a failed run may lie there."""
        found = self._state()
        if unfinished:
            found = {name: digest for name, digest in found.items() if self.UNFINISHED not in name}
        assert found == self._before

    def _state(self) -> dict[str, str]:
        folders = {f"{path}/": "" for path in self._directory.rglob("*") if path.is_dir()}
        return folders | file_hashes(self._directory)
