"""Announced and real times of a whole conversion with each preset.

    python benchmarks/preset_times.py MODEL --device cuda --presets fast balanced best --out FILE

The announced time is what ``ernieq quantize`` says before its first long step; the real one is what it says at
the end, beside the seconds of the whole process, imports included.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_gpu, describe_machine, write_result


def timed(model: str, preset: str, device: str) -> dict[str, str | float]:
    """Convert once at 2 bits."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "--bits",
            "2",
            "--preset",
            preset,
            "--device",
            device,
            "--verbose",
            "--out",
            f"{folder}/packed",
        ]
        command = [sys.executable, "-m", "ernieq.cli", "quantize", model, *options]
        started = time.monotonic()
        ended = subprocess.run(command, capture_output=True, text=True)
        seconds = time.monotonic() - started
    announced = re.search(r"time about (.+)$", ended.stderr, re.MULTILINE)
    took = re.search(r", in (.+)$", ended.stdout, re.MULTILINE)
    if ended.returncode or announced is None or took is None:
        raise SystemExit(f"the conversion failed with status {ended.returncode}: {ended.stderr[-500:]}")
    row = {"preset": preset, "announced": announced[1], "took": took[1], "process_seconds": seconds}
    print(row, flush=True)
    return row


def main() -> None:
    """Convert with every preset in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [timed(options.model, preset, options.device) for preset in options.presets]
    if options.out:
        machine = describe_machine() | (describe_gpu() if options.device == "cuda" else {})
        command = f"python benchmarks/preset_times.py MODEL --device {options.device} --presets " + " ".join(
            options.presets
        )
        result = {"machine": machine, "command": command, "model": Path(options.model).name, "rows": rows}
        write_result(options.out, result)


if __name__ == "__main__":
    main()
