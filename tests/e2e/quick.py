"""Runs the commands of pages as they stand there, but with options appended that make them take seconds."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.convert.conversions import write_words
from tests.tiny import write_tiny

THREADS = 1  # two would wait for each other on a machine that is busy with other tests
HUB_ID = "baidu/ERNIE-4.5-21B-A3B-Base-PT"
_SAMPLE = ["--windows", "4", "--window", "256"]
_QUICK = {
    "quantize": ["--state-bits", "12", *_SAMPLE],
    "calibrate": _SAMPLE,
    "eval-ppl": ["--max-windows", "2", "--max-bytes", "40000"],
    "generate": ["--max-tokens", "8"],
    "sample-text": ["--tokens", "100"],
}
# They need a hub or another's files, and run in tests of their own.
ELSEWHERE = {"push": "tests/cli/test_push.py", "import-wint2": "tests/cli/test_import_wint2.py"}
_WITHOUT_THREADS = ("inspect", "verify", "env", "completion")
# What is made of the checkpoint from the hub has its small vocabulary and few positions.
_OF_THE_HUB = "ernie-21b-"


def write_sources(place: Path) -> None:
    """A tiny checkpoint in place of the one from the hub, its text, and one for nano."""
    write_tiny(place / "hub")
    write_words(place / "words.txt")
    (place / "my_text.txt").write_text("The old house stood on the hill above the river. " * 400)


def prepared(arguments: list[str], place: Path) -> list[str]:
    """A command of a page made quick, and with a tiny checkpoint in place of one from the hub."""
    name = arguments[0]
    if name.startswith("-"):
        return arguments
    if "--vram" in arguments and not torch.cuda.is_available():  # bounds the memory of a GPU, and there is none
        place_of = arguments.index("--vram")
        arguments = arguments[:place_of] + arguments[place_of + 2 :]
    extra = list(_QUICK.get(name, []))
    if name == "eval-ppl" and "--window" not in arguments:
        extra += ["--window", "512"]
    if "--hessians" in arguments:
        extra = extra[:2]  # the sample was drawn when they were collected
    if "--tune" in arguments:
        extra += ["--tune-steps", "1"]
    if name not in _WITHOUT_THREADS:
        extra += ["--threads", str(THREADS)]
    if HUB_ID in arguments and "--hessians" not in arguments and name not in _WITHOUT_THREADS:
        extra += ["--text", str(place / "words.txt"), "--window", "32"]
    of_the_hub = any(word.startswith(_OF_THE_HUB) for word in arguments)
    if name == "bench" and of_the_hub:
        extra += ["--prompt", "8", "--tokens", "4"]
    return [str(place / "hub") if word == HUB_ID else word for word in arguments] + extra
