"""Which implementation of a kernel runs: always an argument, never an environment variable."""

from __future__ import annotations

import os
import platform
from enum import StrEnum
from pathlib import Path

from ernieq.errors import BackendUnavailableError


class Backend(StrEnum):
    """An implementation: the plain reference, or C++ for one instruction set."""

    AUTO = "auto"
    REFERENCE = "reference"
    SCALAR = "scalar"
    AVX2 = "avx2"
    AVX512 = "avx512"


def resolve_backend(backend: Backend) -> Backend:
    """Turn ``AUTO`` into the best C++ path of this processor and check that any other can run.

    Raises:
        BackendUnavailableError: the C++ module is missing, or the processor lacks the instruction set.
    """
    if backend is Backend.REFERENCE:
        return backend
    try:
        from ernieq.kernels import _native
    except ImportError as error:
        raise BackendUnavailableError(
            f"the C++ kernels are not built ({error}); install the package again or pass --backend reference"
        ) from error
    available = [Backend(name) for name in _native.available_isas()]
    if backend is Backend.AUTO:
        return available[-1]
    if backend not in available:
        raise BackendUnavailableError(
            f"backend {backend} needs instructions that this processor lacks; it has {', '.join(available)}"
        )
    return backend


def unusable_backend(backend: Backend) -> str:
    """Why a backend can't run on this machine; empty if it can."""
    try:
        resolve_backend(backend)
    except BackendUnavailableError as error:
        return str(error)
    return ""


def processor_features() -> dict[str, bool]:
    """Instruction set extensions that the C++ kernels ask for, and whether this processor has them.

    Empty where the C++ module is missing, or was built for a processor that has none of them.
    """
    try:
        from ernieq.kernels import _native
    except ImportError:
        return {}
    return _native.processor_features()


def processor_name() -> str:
    """What the processor is called; empty where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def default_threads() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
