"""Announced and real times of a whole conversion with each preset.

    python benchmarks/preset_times.py MODEL --device cuda --presets fast balanced best --out FILE

``ernieq quantize`` announces its time before its first long step: ``seconds`` are those from there to the end
of the process, ``seconds_before`` those until then, with imports, the probe, and the text that a model writes
for itself.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe_gpu, describe_machine, write_result


def timed(model: str, preset: str, device: str) -> dict[str, Any]:
    """Convert once at 2 bits."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bits", "2", "--preset", preset, "--device", device, "--verbose"]
        command = [sys.executable, "-m", "ernieq.cli", "quantize", model, *options, "--out", f"{folder}/packed"]
        started = time.monotonic()
        lines = []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append((round(time.monotonic() - started, 2), line.rstrip().replace(f"{folder}/", "")))
    ended = time.monotonic() - started
    announced = [(at, found[1]) for at, line in lines if (found := re.search(r"time about (.+)$", line))]
    if process.returncode or not announced:
        raise SystemExit(f"the conversion ended with status {process.returncode}: {lines[-3:]}")
    (at, estimate), *_ = announced
    shown = [(when, line) for when, line in lines if not line.startswith(("  ", "tuning: step"))]
    row = {"preset": preset, "announced": estimate, "seconds": ended - at, "seconds_before": at, "lines": shown}
    print(*(f"{when:8.2f} {line}" for when, line in shown), f"{ended:8.2f} end", sep="\n", flush=True)
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
