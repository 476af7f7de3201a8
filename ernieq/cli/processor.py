"""Which processor a command that runs a model works on, and how it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ernieq.cli.shared import device_was_chosen
from ernieq.cli.verbosity import detail, note
from ernieq.kernels.backend import Backend, resolve_backend

if TYPE_CHECKING:
    import torch


def settle_device(device: torch.device, backend: Backend, *, quiet: bool = False) -> torch.device:
    """What ``--device`` and ``--backend`` come to: a backend of the CPU keeps ``--device auto`` off the GPU.

    Args:
        device: what ``device_option`` gave.
        backend: what ``backend_option`` gave.
        quiet: whether a GPU that was chosen by ``auto`` goes unmentioned.

    Raises:
        BackendUnavailableError: the work is the CPU's, and the backend can't run on it.
    """
    import torch

    if device.type != "cpu" and device_was_chosen():
        if backend is not Backend.AUTO:
            device = torch.device("cpu")
        elif not quiet:
            note(f"Running on {torch.cuda.get_device_name(device)} ({device}).")
    if device.type == "cpu":
        detail(f"kernels: {resolve_backend(backend)} on the CPU, {torch.get_num_threads()} threads")
    else:
        detail(f"kernels: CUDA {torch.version.cuda} on {torch.cuda.get_device_name(device)}")
    return device
