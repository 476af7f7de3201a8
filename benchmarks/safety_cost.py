"""What the journal, the snapshots and the checks take of whole conversions.

    python benchmarks/safety_cost.py MODEL --device cuda --preset balanced --repeats 3 --out FILE

Two conversions one after the other differ by more than that on most machines, so it is counted within one:
seconds that the thread which converts spends in them or waits for them, and processor seconds of the threads
beside it, which write units and hash the source.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from machine import describe_gpu, describe_machine, write_result

from ernieq.cli import main as ernieq_main
from ernieq.convert.job import Conversion
from ernieq.convert.journal import Journal
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.snapshots import Snapshots
from ernieq.convert.source_hashes import SourceHashes
from ernieq.convert.unit_store import UnitStore
from ernieq.pack import writer

_CHILD = "--child"
_WAITED: list[tuple[Any, str, str]] = [
    (UnitStore, "keep", "units kept and decoded again"),
    (UnitStore, "matrix", "units read again"),
    (Snapshots, "save", "snapshots"),
    (BackgroundQueue, "submit", "waiting for the disk"),
    (BackgroundQueue, "wait", "waiting for the disk"),
    (SourceHashes, "result", "waiting for the source's hashes"),
    (Journal, "append", "journal lines"),
    (writer, "verify_packed", "output verified"),
]
_BESIDE: list[tuple[Any, str]] = [(BackgroundQueue, "_work"), (SourceHashes, "_work")]


class Account:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self.waited, self.beside = defaultdict[str, float](float), defaultdict[str, float](float)
        self.whole = 0.0
        self._inside = False

    def within(self, genuine: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Counts the outermost call in the main thread."""

        @functools.wraps(genuine)
        def counted(*arguments: Any, **options: Any) -> Any:
            if self._inside or threading.current_thread() is not threading.main_thread():
                return genuine(*arguments, **options)
            self._inside, started = True, time.monotonic()
            try:
                return genuine(*arguments, **options)
            finally:
                self.waited[name] += time.monotonic() - started
                self._inside = False

        return counted

    def thread(self, genuine: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Counts the processor time of a thread."""

        @functools.wraps(genuine)
        def counted(*arguments: Any) -> None:
            genuine(*arguments)
            self.beside[name] += time.thread_time()

        return counted

    def conversion(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        """Counts the time of a whole conversion."""

        @functools.wraps(genuine)
        def counted(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            report = genuine(*arguments, **options)
            self.whole = time.monotonic() - started
            return report

        return counted

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Count what is done meanwhile."""
        for owner, name, label in _WAITED:
            patch.object(owner, name, self.within(getattr(owner, name), label)).start()
        for owner, name in _BESIDE:
            patch.object(owner, name, self.thread(getattr(owner, name), owner.__name__)).start()
        patch.object(Conversion, "run", self.conversion(Conversion.run)).start()
        try:
            yield
        finally:
            patch.stopall()


def child(file: str, arguments: list[str]) -> None:
    """One conversion in a process of its own; writes its account."""
    account = Account()
    with account.kept():
        ernieq_main(arguments, standalone_mode=False)
    facts = {"conversion": account.whole, "waited": account.waited, "processor_beside": account.beside}
    Path(file).write_text(json.dumps(facts), encoding="utf-8")


def one(model: str, arguments: list[str]) -> dict[str, Any]:
    """The account of a conversion."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "account.json"
        command = [sys.executable, __file__, _CHILD, str(file), "quantize", model, *arguments]
        subprocess.run([*command, "--out", f"{folder}/packed"], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    waited, beside = sum(found["waited"].values()), sum(found["processor_beside"].values())
    shares = {
        "share_waited": waited / found["conversion"],
        "share_with_all_of_the_threads_beside": (waited + beside) / found["conversion"],
    }
    print(json.dumps(found | shares), flush=True)
    return found | shares


def main() -> None:
    """Convert, and print what the checks took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = ["--bits", "2", "--preset", options.preset, "--device", options.device]
    runs = [one(options.model, arguments) for _ in range(options.repeats)]
    if options.out:
        machine = describe_machine() | (describe_gpu() if options.device == "cuda" else {})
        command = f"python benchmarks/safety_cost.py MODEL --device {options.device} --preset {options.preset}"
        model = Path(options.model).name
        write_result(options.out, {"machine": machine, "command": command, "model": model, "runs": runs})


if __name__ == "__main__":
    if sys.argv[1:2] == [_CHILD]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
