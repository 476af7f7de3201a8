"""A command starts without the parts of torch that take seconds to import and that it has no use for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.convert.conversions import write_words

SLOW = {"sympy", "torch._dynamo", "torch.distributed.fsdp"}
SCRIPT = f"""
import sys
from ernieq.cli import main
main(sys.argv[1:], standalone_mode=False)
print("imported:", sorted({SLOW} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", ["quantize", "eval-ppl"])
def test_a_command_imports_neither_the_compiler_of_torch_nor_sympy(
    command: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    text = write_words(tmp_path / "words.txt", 4000)
    arguments = [command, str(tiny()), "--text", str(text), "--window", "32", "--device", "cpu"]
    if command == "quantize":
        arguments += ["--bits", "2", "--windows", "4", "--state-bits", "12", "--out", str(tmp_path / "packed")]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines()[-1:] == ["imported: []"], ended.stderr
