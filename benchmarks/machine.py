"""What machine a figure comes from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
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


def describe_gpu() -> dict[str, Any]:
    """Name, clocks as found, driver and versions of the current GPU; raises where there is none."""
    import torch

    query = "name,driver_version,clocks.current.sm,clocks.max.sm,clocks.current.memory,power.limit"
    index = torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    properties = torch.cuda.get_device_properties(index)
    return {
        "gpu": answer[0],
        "driver": answer[1],
        "sm_clock_mhz_as_found": int(answer[2]),
        "max_sm_clock_mhz": int(answer[3]),
        "memory_clock_mhz_as_found": int(answer[4]),
        "power_limit_watts": float(answer[5]),
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
