"""Fuzz the readers for some minutes: ``python -m tests.hostile.fuzz --minutes 10``.

The tests ``test_fuzz_*`` of this folder run few and fixed examples; here they take turns with new random ones.
What fails is printed, shrunk to its least, once for each place in the code; it belongs into a test then.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings

MODULES = ("test_fuzz_packed", "test_fuzz_source", "test_fuzz_texts")
settings.register_profile(
    "fuzz",
    max_examples=300,  # of one turn
    derandomize=False,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def targets() -> dict[str, Any]:
    """The fuzz tests by name; they take the profile that is loaded when they are imported."""
    return {
        f"{module}.{name}": test
        for module in MODULES
        for name, test in vars(importlib.import_module(f"tests.hostile.{module}")).items()
        if name.startswith("test_fuzz_")
    }


def main() -> int:
    """Take turns until the time is up; the exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first turn")
    options = parser.parse_args()
    settings.load_profile("fuzz")
    end, turn = time.monotonic() + 60 * options.minutes, options.seed
    examples: Counter[str] = Counter()
    found: set[str] = set()
    while time.monotonic() < end:
        for name, test in targets().items():
            if time.monotonic() < end:
                run_turn(name, test, turn, examples, found)
        turn += 1
    for name, count in sorted(examples.items()):
        print(f"{name}: {count:,} examples")
    print(f"{sum(examples.values()):,} examples, {len(found)} findings")
    return 1 if found else 0


def run_turn(name: str, test: Any, turn: int, examples: Counter[str], found: set[str]) -> None:
    """Some hundred examples of one test; a failure is printed unless its place is known."""
    inner = test.hypothesis.inner_test

    def counted(*arguments: Any, **keywords: Any) -> None:
        examples[name] += 1
        inner(*arguments, **keywords)

    test.hypothesis.inner_test = counted
    try:
        seed(turn)(test)()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{name}: {type(error).__name__} at {frame.filename}:{frame.lineno}"
        if place not in found:
            found.add(place)
            print(f"== {place}")
            traceback.print_exception(error)
            sys.stdout.flush()
    finally:
        test.hypothesis.inner_test = inner


if __name__ == "__main__":
    sys.exit(main())
