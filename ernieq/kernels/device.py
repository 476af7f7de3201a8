"""Which processor works: the CPU, or one NVIDIA GPU."""

from __future__ import annotations

import torch

from ernieq.errors import BackendUnavailableError, UsageError

OLDEST_CAPABILITY = (8, 0)  # Ampere: the first with the tensor-core and half2 instructions that the kernels use


def resolve_device(name: str | torch.device) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device that can run the kernels.

    ``auto`` takes the current GPU where one is usable and the CPU elsewhere.

    Raises:
        UsageError: the name means nothing.
        BackendUnavailableError: a GPU was asked for by name and none is there, or it is too old.
    """
    if str(name) == "auto":
        return torch.device("cpu") if unusable_gpu() else torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device is {name!r}; allowed are auto, cpu, cuda and cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"device is {name!r}; allowed are auto, cpu, cuda and cuda:N")
    if reason := unusable_gpu(device.index):
        raise BackendUnavailableError(f"device {name} can't be used: {reason}; pass --device cpu")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def unusable_gpu(index: int | None = None) -> str:
    """Why a GPU (the current one by default) can't run the kernels; empty if it can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "no NVIDIA GPU was found" if built else "this torch was built without CUDA"
    if index is not None and index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, counted from 0"
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return (
            f"{name} has compute capability {found[0]}.{found[1]}; "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} (Ampere) or newer is needed"
        )
    try:
        import cuda.core  # noqa: F401 - only whether it is there
    except ImportError:
        return (
            "the package cuda-core, which compiles the kernels, is not installed (pip install 'ernieq[cuda]')"
        )
    return ""


def require_memory(device: torch.device, needed_bytes: int, purpose: str) -> None:
    """Check that a GPU has room before something large is put there; the CPU always passes.

    Raises:
        BackendUnavailableError: less is free than needed.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed_bytes > free:
        raise BackendUnavailableError(
            f"{purpose} needs {needed_bytes / 1e9:.2f} GB of GPU memory; {device} has {free / 1e9:.2f} of "
            f"{total / 1e9:.2f} GB free; pass --device cpu"
        )
