"""A kernel whose threads get no memory raises, and one that gets no threads does without; neither aborts."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SETUP = """
import resource
import numpy as np
from ernieq.kernels import _native

def limit(more):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))

draw = np.random.default_rng(0)
targets = draw.integers(-9000, 9000, (64, 256)).astype(np.int16)
values = draw.integers(-9000, 9000, 1 << 16).astype(np.int16)

def encode(threads, state_bits):
    symbols = np.zeros((64, 256), np.uint8)
    table = values[: 1 << state_bits]
    _native.viterbi_encode(targets, table, 4, state_bits, 16, symbols, "scalar", threads)
    return symbols
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _SETUP + program], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of address space")
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_that_is_refused_in_a_thread_is_a_memory_error(threads: int) -> None:
    # Three threads get their stacks of 8 MB; what they allocate is more than what is left.
    found = run(
        f"limit({20_000_000 if threads > 1 else 2_000_000})\n"
        f"try:\n    encode({threads}, 16)\nexcept MemoryError:\n    print('refused')\n"
    )
    assert (found.returncode, found.stdout) == (0, "refused\n"), found.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of address space")
def test_threads_that_are_refused_are_done_without() -> None:
    found = run(
        "wanted = encode(1, 10)\nlimit(1_000_000)\nassert (encode(4, 10) == wanted).all()\nprint('same')\n"
    )
    assert (found.returncode, found.stdout) == (0, "same\n"), found.stderr
