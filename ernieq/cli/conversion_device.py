"""Where ``quantize`` and ``calibrate`` work: what ``--device``, ``--vram`` and ``--backend`` come to."""

from __future__ import annotations

import torch

from ernieq.cli.processor import settle_device
from ernieq.cli.shared import device_was_chosen
from ernieq.cli.verbosity import note
from ernieq.errors import UsageError
from ernieq.kernels.backend import Backend
from ernieq.kernels.device import unusable_gpu

_GIGABYTE = 1_000_000_000


def settle_conversion(
    device: torch.device, vram: float | None, backend: Backend = Backend.AUTO, *, quiet: bool = False
) -> tuple[torch.device, int | None]:
    """The device and the bytes of its memory that may be used; says on stderr what ``--device auto`` took.

    Args:
        device: what ``device_option`` gave.
        vram: what ``vram_option`` gave.
        backend: what ``backend_option`` gave; one of the CPU keeps ``--device auto`` off the GPU.
        quiet: whether nothing is said.

    Raises:
        UsageError: memory of a GPU is bounded and the CPU does the work.
    """
    device = settle_device(device, backend, quiet=quiet)
    if device.type == "cuda":
        return device, None if vram is None else int(vram * _GIGABYTE)
    if vram is not None:
        raise UsageError("--vram bounds the memory of a GPU, and the work is done on the CPU")
    if device_was_chosen() and not quiet:
        reason = "the backend is one of it" if backend is not Backend.AUTO else unusable_gpu()
        note(f"Running on the CPU ({reason}).")
    return device, None
