"""``ernieq env``: what this machine has, and which backends can run on it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from ernieq.cli.shared import json_option, print_json
from ernieq.kernels.backend import (
    Backend,
    default_threads,
    processor_features,
    processor_name,
    resolve_backend,
    unusable_backend,
)
from ernieq.records import format_bytes

_PACKAGES = ("ernieq", "torch", "transformers", "numpy", "safetensors", "huggingface-hub", "cuda-core")


@click.command("env")
@json_option
def command(as_json: bool) -> None:
    """Say what this machine has: versions, processor, GPUs, and why a backend can't run where it can't.

    \b
    Example:
      ernieq env
      ernieq env --json
    """
    facts = {
        "versions": _versions(),
        "processor": _processor(),
        "gpus": _gpus(),
        "backends": _backends(),
        "auto": _auto(),
    }
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(_lines(facts)))


env = command


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> dict[str, Any]:
    return {
        "model": processor_name(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "threads": default_threads(),
        "features": processor_features(),
    }


def _gpus() -> list[dict[str, Any]]:
    """Every GPU that torch sees; ``unusable`` says why the kernels can't run on it, empty if they can."""
    import torch

    from ernieq.kernels.device import unusable_gpu

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "free_bytes": torch.cuda.mem_get_info(index)[0],
                "compute_capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda,
                "unusable": unusable_gpu(index),
            }
        )
    return gpus


def _backends() -> dict[str, str]:
    """Backend -> why it can't run here, empty if it can; ``cuda`` is what ``--device cuda`` takes."""
    from ernieq.kernels.device import unusable_gpu

    reasons = {backend.value: unusable_backend(backend) for backend in Backend if backend is not Backend.AUTO}
    return {**reasons, "cuda": unusable_gpu()}


def _auto() -> dict[str, str]:
    """What ``--device auto`` and ``--backend auto`` come to."""
    from ernieq.kernels.device import resolve_device

    built = not unusable_backend(Backend.AUTO)
    return {
        "device": str(resolve_device("auto")),
        "backend": resolve_backend(Backend.AUTO) if built else "none",
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    processor, auto = facts["processor"], facts["auto"]
    versions = [f"{name} {number or 'missing'}" for name, number in facts["versions"].items()]
    features = [name if there else f"no {name}" for name, there in processor["features"].items()]
    lines = [
        f"versions   {', '.join(versions)}",
        f"processor  {processor['model']} ({processor['system']}, {processor['architecture']}), "
        f"{processor['threads']} threads",
        f"features   {', '.join(features) or 'none that the kernels ask for'}",
    ]
    for index, gpu in enumerate(facts["gpus"]):
        lines.append(
            f"cuda:{index}     {gpu['name']}, {format_bytes(gpu['memory_bytes'])} "
            f"({format_bytes(gpu['free_bytes'])} free), compute capability {gpu['compute_capability']}"
            + (f"; not usable: {gpu['unusable']}" if gpu["unusable"] else "")
        )
    if not facts["gpus"]:
        lines.append(f"GPU        none: {facts['backends']['cuda']}")
    lines += [
        f"backend    {name}: {f'no, {reason}' if reason else 'yes'}"
        for name, reason in facts["backends"].items()
    ]
    return [*lines, f"auto       --device {auto['device']}, --backend {auto['backend']}"]
