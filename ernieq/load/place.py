"""Where a model runs and by which kernels, settled before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ernieq.errors import UsageError
from ernieq.kernels import Backend, resolve_backend
from ernieq.kernels.device import resolve_device
from ernieq.load.source import PackedSource, WeightSource


@dataclass(frozen=True)
class Place:
    """A device and, for the CPU, an implementation of its kernels."""

    device: torch.device
    backend: Backend

    def check(self, source: WeightSource) -> None:
        """Check that the backend can run, if it will be needed.

        Raises:
            BackendUnavailableError: it can't.
        """
        if self.device.type == "cpu" and isinstance(source, PackedSource):
            resolve_backend(self.backend)


def resolve_place(device: str | torch.device, backend: Backend) -> Place:
    """Turn the names of a device and a backend into a place where kernels can run.

    Raises:
        UsageError: the device means nothing, or a backend of the CPU was asked for together with a GPU.
        BackendUnavailableError: no such GPU can be used.
    """
    found = resolve_device(device)
    if found.type != "cpu" and backend is not Backend.AUTO:
        raise UsageError(f"backend {backend} is one of the CPU's, but the device is {found}; pass --device cpu")
    return Place(found, backend)
