"""What machine a figure comes from."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores and versions; no host name, no path."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.is_file():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = named.get("model name", model), named.get("flags", "")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "avx512": "avx512bw" in flags,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("ernieq", "torch", "numpy")},
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as indented JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
