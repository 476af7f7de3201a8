"""What an interrupted ``quantize`` or ``calibrate`` says, and how the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from ernieq.checkpoint import open_checkpoint
from ernieq.convert import (
    Allocator,
    Estimate,
    Staging,
    default_recipe,
    groups,
    make_plan,
    remaining_seconds,
    snapshots,
)
from tests.cli.quantizing import CODE, SAMPLE, done, quantize, refused, run
from tests.convert.conversions import file_hashes, write_words
from tests.convert.faults import Disk, KilledError

TARGET = ["--target-decoder-size", "17kB"]
HESSIANS = ["--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def source(tiny: Callable[..., Path]) -> Path:
    directory = tiny(tied=False)
    write_words(directory.parent / "words.txt", 800)
    return directory


def weights(packed: Path) -> dict[str, str]:
    """Hashes of all files but those that name their directory or tell the time."""
    return {
        name: digest for name, digest in file_hashes(packed).items() if name not in ("ernieq.json", "README.md")
    }


def signalled(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Result], after: int, *numbers: int) -> Result:
    """Run a command that is sent signals while it encodes for the ``after``-th time."""
    genuine, calls = groups.__dict__["encode_matrices"], 0

    def encode(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        for number in numbers if calls == after else ():
            os.kill(os.getpid(), number)
        return genuine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(groups, "encode_matrices", encode)
        return work()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_75_and_the_command_that_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, before = tmp_path / "packed", signal.getsignal(number)
    done(quantize(source, tmp_path / "whole"))
    stopped = signalled(monkeypatch, lambda: quantize(source, out), 9, number)
    assert stopped.exit_code == 75
    sentence = stopped.stderr.splitlines()[-1]
    assert sentence.startswith("Interrupted: stopped: ")
    assert "% of the weights are encoded" in sentence
    given = [source, "--out", out, "--text", source.parent / "words.txt", *CODE, *SAMPLE]
    assert sentence.endswith(f"go on with: ernieq quantize {' '.join(map(str, given))}")
    assert signal.getsignal(number) is before
    assert not out.exists()
    resumed = quantize(source, out)
    done(resumed)
    assert "resuming from" in resumed.stderr
    assert weights(out) == weights(tmp_path / "whole")
    assert not (tmp_path / "packed.partial").exists()


def test_a_run_that_goes_on_announces_the_rest_and_measures_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def estimate(*_: Any, **__: Any) -> Estimate:
        measured.append(1)
        return Estimate(1000.0, 7.0)

    def announced(result: Result) -> float:
        return float(re.findall(r"time about (\S+) s$", result.stderr, re.MULTILINE)[0])

    monkeypatch.setattr("ernieq.cli.preflight.estimate_time", estimate)
    monkeypatch.setattr("ernieq.cli.conversion_output.format_seconds", lambda seconds: f"{seconds} s")
    out = tmp_path / "packed"
    stopped = signalled(monkeypatch, lambda: quantize(source, out, "-v"), 9, signal.SIGTERM)
    assert announced(stopped) == 1007
    kept = {file.name: file.read_bytes() for file in (tmp_path / "packed.partial").glob("*.json")}
    with monkeypatch.context() as patch:
        patch.delattr("ernieq.convert.job.draw_sample")  # the tokens were kept
        resumed = quantize(source, out, "-v")
    done(resumed)
    share = int(re.findall(r"(\d+) % of the weights are encoded", resumed.stderr)[0]) / 100
    assert 0 < share < 1
    assert announced(resumed) == pytest.approx(1000 * (1 - share) + 7, abs=5.01)
    assert measured == [1]
    assert '"threads"' in kept["pace.json"].decode()


def test_a_run_that_goes_on_with_other_threads_measures_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seconds = tmp_path / "packed", Estimate(1000.0, 7.0)
    monkeypatch.setattr("ernieq.cli.preflight.estimate_time", lambda *_, **__: seconds)
    signalled(monkeypatch, lambda: quantize(source, out), 9, signal.SIGTERM)
    with Staging(out) as staging:
        plan = make_plan(open_checkpoint(source), default_recipe(2))
        cpu = torch.device("cpu")
        assert remaining_seconds(staging, plan, cpu) is not None
        monkeypatch.setattr("torch.get_num_threads", lambda: 99)
        assert remaining_seconds(staging, plan, cpu) is None


def test_a_second_signal_stops_at_once_and_finished_units_stay(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> Result:
        return quantize(source, tmp_path / "packed")

    assert signalled(monkeypatch, work, 5, signal.SIGINT, signal.SIGINT).exit_code == 130
    assert len(list((tmp_path / "packed.partial" / "units").iterdir())) == 4


def test_another_recipe_is_refused_until_restart_discards_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    signalled(monkeypatch, lambda: quantize(source, out), 5, signal.SIGTERM)
    named = ("recipe: parts.routed_experts 2 -> 3", "--restart", "packed.partial")
    refused(quantize(source, out, "--bits", "3"), 2, *named)
    restarted = quantize(source, out, "--bits", "3", "--restart")
    done(restarted)
    assert "resuming" not in restarted.stderr
    assert not (tmp_path / "packed.partial").exists()


def test_the_command_that_goes_on_does_not_restart(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> Result:
        return quantize(source, tmp_path / "packed", "--restart")

    assert "--restart" not in signalled(monkeypatch, work, 3, signal.SIGTERM).stderr


def test_a_second_process_on_one_output_is_refused(source: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "packed"):
        refused(quantize(source, tmp_path / "packed"), 2, "is being written by process", "--out")


KILLED_BEHIND_A_LINE = """
import os, signal, sys
from ernieq.cli import main
from ernieq.convert.journal import Journal

append, left = Journal.append, int(sys.argv[1])

def counted(journal, *arguments, **facts):
    global left
    append(journal, *arguments, **facts)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = counted
main(sys.argv[2:])
"""


def test_a_process_that_is_killed_and_resumed_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    done(quantize(source, tmp_path / "whole"))
    out, text = tmp_path / "packed", source.parent / "words.txt"
    arguments = ["quantize", source, "--out", out, "--text", text, *CODE, *SAMPLE]
    command = [sys.executable, "-c", KILLED_BEHIND_A_LINE, "8", *map(str, arguments)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    resumed = quantize(source, out)
    done(resumed)
    assert "resuming from" in resumed.stderr
    assert weights(out) == weights(tmp_path / "whole")


def test_bits_that_were_measured_are_not_measured_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "packed"
    done(quantize(source, tmp_path / "whole", *TARGET))
    assert signalled(monkeypatch, lambda: quantize(source, out, *TARGET), 5, signal.SIGTERM).exit_code == 75
    refused(quantize(source, out, "--target-decoder-size", "18kB"), 2, "target: --target-decoder-size", "18000")
    monkeypatch.setattr(Allocator, "allocate", None)
    done(quantize(source, out, *TARGET))
    assert weights(out) == weights(tmp_path / "whole")
    found, wanted = (json.loads((path / "ernieq.json").read_text()) for path in (out, tmp_path / "whole"))
    assert found["report"]["allocation"] == wanted["report"]["allocation"]
    assert not (tmp_path / "packed.partial").exists()


@pytest.mark.parametrize("after", [5, 40])
def test_rounds_of_a_divergence_go_on_within_their_round(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    from ernieq.cli import allocating

    wanted = ["--max-kl", "0.03", "--windows", "8"]

    def measure_in_turn() -> None:
        found = {"whole": iter([0.06, 0.02]), "packed": iter([0.06, 0.02])}
        monkeypatch.setattr(allocating, "measured_divergence", lambda run, _: next(found[run.out.name]))

    measure_in_turn()
    done(quantize(source, tmp_path / "whole", *wanted))
    stopped = signalled(
        monkeypatch, lambda: quantize(source, tmp_path / "packed", *wanted), after, signal.SIGTERM
    )
    assert stopped.exit_code == 75
    assert ("round 1:" in stopped.stderr) == (after == 40)  # a round encodes 33 times
    resumed = quantize(source, tmp_path / "packed", *wanted)
    done(resumed)
    assert ("round 1:" in resumed.stderr) == (after == 5)
    assert weights(tmp_path / "packed") == weights(tmp_path / "whole")
    assert not (tmp_path / "packed.partial").exists()


def calibrate(source: Path, out: Path, *options: str | Path) -> Result:
    return run("calibrate", source, "--text", source.parent / "words.txt", *HESSIANS, "--out", out, *options)


def test_calibrate_goes_on_behind_the_last_finished_layer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    done(calibrate(source, tmp_path / "whole"))
    wanted, out, number = file_hashes(tmp_path / "whole"), tmp_path / "hessians", 1
    resumed = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, number)
            try:
                finished = calibrate(source, out).exit_code == 0
            except KilledError:
                finished = False
        if finished:
            break
        again = calibrate(source, out)
        resumed += "layers are finished" in again.stderr
        assert again.exit_code == 0 or "--overwrite" in again.stderr  # killed while leftovers were removed
        assert file_hashes(out) == wanted, number
        assert not (tmp_path / "hessians.partial").exists()
        for path in [*out.iterdir()]:
            path.unlink()
        out.rmdir()
        number += 3
    assert resumed > 3
