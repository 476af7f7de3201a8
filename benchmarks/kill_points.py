"""Kill conversions at random moments, resume them, and compare the bytes; and what the journal costs.

    python benchmarks/kill_points.py --kills 200 --out FILE
    python benchmarks/kill_points.py --spawn --kills 6 --longest 60 --pairs 0 --out FILE
    python benchmarks/kill_points.py --device cuda --model DIR --kills 12 --longest 20 --out FILE

A conversion is started again and again with the same command and killed with SIGKILL after a random time,
counted from its start or from the first matrix that it encodes, until it gets to its end before the time is
over. On a processor every process is a fork of this one, which has done a whole conversion before: what is
measured of a resumed run is its own work and no imports. A process that forks must have no threads, so all is
done with one, and on little text. With ``--spawn``, and on a GPU, which a fork can't use, every process is a
new one, its imports count, and the conversion is that of ``ernieq quantize --bits 2``.

Compared are all files but ``ernieq.json`` byte by byte, and that without its time and duration.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from machine import describe_gpu, describe_machine, write_result

from ernieq.cli import main as ernieq_main
from ernieq.convert import Staging, groups, job
from ernieq.convert.journal import Journal
from ernieq.convert.snapshots import Snapshots
from ernieq.convert.staging import staging_path
from ernieq.convert.unit_store import Unit
from ernieq.trellis import EncodedMatrix

ON_CPU = ["--device", "cpu", "--threads", "1"]
QUICK = ["--bits", "2", "--state-bits", "12", "--windows", "2", "--window", "256", *ON_CPU]
FULL = ["--bits", "2", "--windows", "8", *ON_CPU]
_WITHIN_ENCODING = 0.7  # share of the kills whose time counts from the first matrix that is encoded
_STARTED, _FIRST, _KEPT, _CHILD = "started", "first-encoding", "journal-at-the-end.jsonl", "--child"


class Unstored:
    """In place of the store of units: holds encoded matrices in memory; nothing is checked or written."""

    def __init__(self, *_: Any) -> None:
        self.modules: set[str] = set()
        self.used: dict[str, str] = {}
        self._matrices: dict[str, EncodedMatrix] = {}

    def fetch(self, batch: Sequence[Sequence[str]]) -> list[Unit] | None:
        """Nothing is there."""

    def keep(self, batch: Sequence[Unit], _check: Callable[[Sequence[Unit]], None]) -> None:
        """Hold a batch."""
        for unit in batch:
            self._matrices |= unit.matrices
            self.used |= {name: name for name in unit.matrices}

    def matrix(self, module: str) -> EncodedMatrix:
        """A matrix that was kept."""
        return self._matrices[module]


def without_journal(_: Path) -> None:
    """Let conversions of this process keep nothing."""
    patch.object(job, "UnitStore", Unstored).start()
    patch.object(Snapshots, "save").start()
    patch.object(Journal, "append").start()


def watched(work: Path) -> None:
    """Note when the first matrix is encoded, and keep the journal of a conversion that gets to its end."""
    genuine, remove = vars(groups)["encode_matrices"], Staging.remove
    started = (work / _STARTED).stat().st_mtime

    @functools.wraps(genuine)
    def encode(*arguments: Any, **options: Any) -> Any:
        if not (work / _FIRST).exists():
            (work / _FIRST).write_text(str(time.time() - started))
        return genuine(*arguments, **options)

    def keep_journal(staging: Staging) -> None:
        shutil.copyfile(staging.path / "journal.jsonl", work / _KEPT)
        remove(staging)

    patch.object(groups, "encode_matrices", encode).start()
    patch.object(Staging, "remove", keep_journal).start()


PREPARED: dict[str, Callable[[Path], None]] = {
    "plain": lambda _: None,
    "watched": watched,
    "without-journal": without_journal,
}


def child_of(work: Path, prepared: str, arguments: list[str], spawn: bool) -> int:
    """Start ``ernieq`` in a process of its own, prepared by a function of ``PREPARED``; returns its number."""
    log = work / "log"
    (work / _STARTED).touch()
    if spawn:
        command = [sys.executable, __file__, _CHILD, str(work), prepared, *arguments]
        to_log = (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.posix_spawn(
            sys.executable, command, os.environ, file_actions=[to_log, (os.POSIX_SPAWN_DUP2, 1, 2)]
        )
    child = os.fork()
    if child:
        return child
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 70
    try:
        PREPARED[prepared](work)
        ernieq_main(arguments, standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def finished(child: int, seconds: float | None = None, begun: Path | None = None) -> bool:
    """Wait for a process to end.

    Args:
        child: its number.
        seconds: when to kill it, if at all.
        begun: the seconds count from when this file is there.

    Returns:
        False if it was killed.
    """
    counting = time.monotonic()
    while seconds is None or time.monotonic() < counting + seconds:
        if begun is not None and not begun.exists():
            counting = time.monotonic()
        ended, status = os.waitpid(child, 0 if seconds is None else os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"a conversion failed with status {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def contents(packed: Path) -> dict[str, str]:
    """Hash of every file; of the manifest without what no two runs share."""
    manifest = json.loads((packed / "ernieq.json").read_text(encoding="utf-8"))
    del manifest["created"], manifest["report"]["seconds"]
    files = {path.name: path.read_bytes() for path in packed.iterdir() if path.name != "ernieq.json"}
    files["ernieq.json"] = json.dumps(manifest).encode()
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in sorted(files.items())}


def encoded_again(journal: Path) -> int:
    """Units that the journal has more than once."""
    lines = [json.loads(line) for line in journal.read_text(encoding="ascii").splitlines()]
    keys = Counter(line["key"] for line in lines if line["event"] == "unit")
    return sum(count - 1 for count in keys.values())


def journalled(staging: Path) -> int:
    """Units that the journal has."""
    journal = staging / "journal.jsonl"
    return journal.read_bytes().count(b'{"event": "unit"') if journal.exists() else 0


def one_life(work: Path, arguments: list[str], spawn: bool, most: float, draw: random.Random) -> dict[str, Any]:
    """One conversion with all its kills, and what became of it."""
    out, kills, waits = work / "packed", list[int](), list[float]()
    command = ["quantize", "--out", str(out), *arguments]
    while True:
        (work / _FIRST).unlink(missing_ok=True)
        before = journalled(staging_path(out))
        begun = work / _FIRST if draw.random() < _WITHIN_ENCODING else None
        child = child_of(work, "watched", command, spawn)
        done = finished(child, draw.uniform(0.0, most), begun)
        if out.exists() and not staging_path(out).exists():
            done = True  # whatever killed it, it had nothing left to do
        if before and (work / _FIRST).exists() and (noted := (work / _FIRST).read_text()):
            waits.append(float(noted))
        if done:
            break
        kills.append(journalled(staging_path(out)))
    lost = encoded_again(work / _KEPT)
    result = {"kills": kills, "lost_units": lost, "resume_seconds": waits, "contents": contents(out)}
    shutil.rmtree(out)
    return result


def timed(work: Path, arguments: list[str], spawn: bool, prepared: str) -> tuple[float, float]:
    """Wall and processor seconds of a conversion that nobody kills."""
    before, started = os.times(), time.monotonic()
    finished(child_of(work, prepared, ["quantize", "--out", str(work / "timed"), *arguments], spawn))
    after, seconds = os.times(), time.monotonic() - started
    shutil.rmtree(work / "timed")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, processor


def overhead(work: Path, arguments: list[str], spawn: bool, pairs: int) -> dict[str, Any]:
    """Conversions with and without the journal, in turn."""
    runs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for _ in range(pairs):
        runs["with"].append(timed(work, arguments, spawn, "plain"))
        runs["without"].append(timed(work, arguments, spawn, "without-journal"))
        print(f"with and without the journal: {runs['with'][-1]}, {runs['without'][-1]}", flush=True)
    best = {name: [min(column) for column in zip(*figures, strict=True)] for name, figures in runs.items()}
    return {
        "options": arguments,
        "clock_and_processor_seconds": runs,
        "processor_overhead": best["with"][1] / best["without"][1] - 1,
    }


@contextmanager
def log_told(work: Path) -> Iterator[None]:
    """Print what a conversion said that failed."""
    try:
        yield
    except SystemExit:
        print((work / "log").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        raise


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--spawn", action="store_true", help="a new process each, and all of the text")
    parser.add_argument("--model", help="a directory; the bundled model if none is named")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--longest", type=float, default=5.0, help="kill within so many seconds")
    parser.add_argument("--pairs", type=int, default=2, help="of conversions with and without the journal")
    parser.add_argument("--minutes", type=float, default=25, help="begin no other conversion after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Kill, resume, compare, and print what was found."""
    options = parsed()
    draw, lives = random.Random(options.seed), list[dict[str, Any]]()
    model, on_gpu = [options.model] if options.model else [], options.device == "cuda"
    spawn, default = options.spawn or on_gpu, ["--bits", "2", "--device", options.device]
    quick, full = (model + arguments for arguments in ((default, default) if spawn else (QUICK, FULL)))
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder, log_told(work := Path(folder)):
        started = time.monotonic()
        uninterrupted = ["quantize", "--out", str(work / "packed"), *quick]
        if spawn:
            finished(child_of(work, "plain", uninterrupted, spawn))
        else:
            ernieq_main(uninterrupted, standalone_mode=False)
        whole, wanted = time.monotonic() - started, contents(work / "packed")
        shutil.rmtree(work / "packed")
        while sum(len(life["kills"]) for life in lives) < options.kills and time.monotonic() < until:
            lives.append(one_life(work, quick, spawn, options.longest, draw))
            found = lives[-1]["contents"]
            differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
            lives[-1]["differing"] = differing
            print(
                f"conversion {len(lives)}: {len(lives[-1]['kills'])} kills, different: {differing}", flush=True
            )
        cost = overhead(work, full, spawn, options.pairs) if options.pairs else None
    waits = [seconds for life in lives for seconds in life["resume_seconds"]]
    result = {
        "machine": describe_machine() | (describe_gpu() if on_gpu else {}),
        "command": f"python benchmarks/kill_points.py {' '.join(sys.argv[1:])}",
        "options": quick,
        "seconds_of_an_uninterrupted_run": whole,
        "conversions": len(lives),
        "kills": sum(len(life["kills"]) for life in lives),
        "units_journalled_at_each_kill": [life["kills"] for life in lives],
        "kills_with_journalled_units": sum(units > 0 for life in lives for units in life["kills"]),
        "lost_units": sum(life["lost_units"] for life in lives),
        "byte_equal": sum(not life["differing"] for life in lives),
        "differing_files": [life["differing"] for life in lives],
        "resume_seconds_until_encoding": {
            "all": [life["resume_seconds"] for life in lives],
            "median": statistics.median(waits) if waits else None,
            "longest": max(waits, default=None),
        },
        "overhead": cost,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_result(options.out, result)


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        PREPARED[sys.argv[3]](Path(sys.argv[2]))
        ernieq_main(sys.argv[4:])
    else:
        main()
