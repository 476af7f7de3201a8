"""Memory that runs out, threads that fail, clocks that jump, other processes: nothing finished is lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.convert import job, unit_store
from ernieq.convert.journal import Journal
from tests.cli.quantizing import CODE, done, quantize, refused
from tests.convert.conversions import write_words
from tests.convert.faults import while_encoding
from tests.e2e.resuming import AGAIN, KEPT, SMALL, raising, resumed, weights
from tests.tiny import write_tiny

MACHINE, GPU = "the memory of this machine ran out", "the memory of the GPU ran out"


@pytest.mark.parametrize(
    ("happens", "named"),
    [
        (lambda: raising(MemoryError()), MACHINE),
        (lambda: bytearray(1 << 60), MACHINE),
        (lambda: torch.empty(10**15), MACHINE),  # torch's own words
        (lambda: raising(RuntimeError("can't start new thread")), MACHINE),
        (lambda: raising(torch.OutOfMemoryError("CUDA out of memory")), GPU),
    ],
)
def test_memory_that_runs_out_while_encoding_ends_with_7_and_loses_nothing(
    source: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    happens: Callable[[], Any],
    named: str,
) -> None:
    with monkeypatch.context() as patch:
        while_encoding(patch, 4, happens)  # a matrix of the first layer, which is not encoded in batches
        refused(quantize(source, tmp_path / "packed"), 7, named, AGAIN, KEPT)
    resumed(source, tmp_path / "packed", wanted)


_LIMITED = """
import resource, sys
import ernieq.cli, ernieq.convert.groups as groups
genuine, calls = groups.encode_matrices, 0

def encode(*arguments):
    global calls
    calls += 1
    if calls == 6:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))  # no page more
    return genuine(*arguments)

groups.encode_matrices = encode
ernieq.cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of address space")
def test_a_process_that_gets_no_page_more_ends_with_7_and_loses_nothing(tmp_path: Path) -> None:
    text = write_words(tmp_path / "words.txt", 8_000)
    source = write_tiny(tmp_path / "source", **SMALL | {"hidden": 64})
    large, out = ("--windows", "32", "--window", "128"), tmp_path / "packed"
    done(quantize(source, tmp_path / "whole", *large))
    arguments = ["quantize", source, "--out", out, "--text", text, *CODE, *large]
    command = [sys.executable, "-c", _LIMITED, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    sentence = found.stderr.splitlines()[-1]
    assert found.returncode == 7, found.stderr
    assert MACHINE in sentence
    assert AGAIN in sentence
    assert KEPT in sentence
    resumed(source, out, weights(tmp_path / "whole"), *large)


@pytest.mark.parametrize(
    ("error", "exit_code", "named"),
    [
        (MemoryError(), 7, (MACHINE, AGAIN, KEPT)),
        (OSError(12, "Cannot allocate memory"), 7, (MACHINE, AGAIN, KEPT)),
        (ValueError("strange"), 70, ("internal error, ValueError: strange",)),
    ],
)
def test_an_error_of_the_thread_that_writes_stops_the_run_as_itself(
    source: Path,
    tmp_path: Path,
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    exit_code: int,
    named: tuple[str, ...],
) -> None:
    genuine, calls = unit_store.__dict__["write_tensor_file"], 0

    def write(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return genuine(*arguments) if calls < 5 else raising(error)

    with monkeypatch.context() as patch:
        patch.setattr(unit_store, "write_tensor_file", write)
        refused(quantize(source, tmp_path / "packed"), exit_code, *named)
    resumed(source, tmp_path / "packed", wanted)


def test_a_journal_that_takes_half_a_line_has_whole_lines_afterwards(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, calls = Journal.append, 0

    def append(self: Journal, event: str, **facts: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != 6:
            genuine(self, event, **facts)
            return
        with pytest.MonkeyPatch.context() as patch:

            def fsync(descriptor: int) -> None:
                os.truncate(descriptor, os.fstat(descriptor).st_size - 9)
                raise OSError(28, os.strerror(28))

            patch.setattr(os, "fsync", fsync)
            genuine(self, event, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        refused(quantize(source, tmp_path / "packed"), 5, "journal.jsonl", "No space left", AGAIN, KEPT)
    journal = tmp_path / "packed.partial" / "journal.jsonl"
    assert [json.loads(line)["event"] for line in journal.read_text().splitlines()]
    resumed(source, tmp_path / "packed", wanted)


def test_the_output_is_put_together_with_little_memory_later(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(job, "keep_rest", lambda *_: raising(MemoryError()))
        refused(quantize(source, tmp_path / "packed"), 7, MACHINE, AGAIN, "100 % of the weights are encoded")
    resumed(source, tmp_path / "packed", wanted)


def test_clocks_that_jump_change_no_byte_and_give_no_negative_duration(
    source: Path, tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, out = random.Random(3), tmp_path / "packed"
    os.utime(source / "model.safetensors", (5e9, 5e9))
    with monkeypatch.context() as patch:
        for name in ("time", "monotonic"):
            patch.setattr(time, name, lambda: 1e6 + 1e6 * draw.uniform(-1, 1))
        while_encoding(patch, 7, lambda: raising(MemoryError()))
        refused(quantize(source, out), 7, MACHINE)
    for file in [*(tmp_path / "packed.partial").rglob("*")]:
        os.utime(file, (1, 1))
    with monkeypatch.context() as patch:
        hours = iter(range(10**6, 0, -3600))
        patch.setattr(time, "monotonic", lambda: next(hours))  # always backwards
        resumed(source, out, wanted)
    assert json.loads((out / "ernieq.json").read_text())["report"]["seconds"] == 0


_HOLD = """
import sys, time
from pathlib import Path
from ernieq.convert import Staging
with Staging(Path(sys.argv[1])) as staging:
    staging.begin({"identity": {}})
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_waited_for_while_it_lives_and_not_when_it_was_killed(
    source: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    out = tmp_path / "packed"
    with subprocess.Popen([sys.executable, "-c", _HOLD, out], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        refused(quantize(source, out), 2, f"is being written by process {process.pid} on ", "wait for it")
        process.kill()
    assert (tmp_path / "packed.partial" / "lock").exists()
    done(quantize(source, out))
    assert weights(out) == wanted
    assert not (tmp_path / "packed.partial").exists()
