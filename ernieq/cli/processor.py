"""Which processor a command that runs a model works on, and how it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ernieq.cli.shared import device_was_chosen
from ernieq.kernels.backend import Backend

if TYPE_CHECKING:
    import torch


def settle_device(device: torch.device, backend: Backend, *, quiet: bool = False) -> torch.device:
    """What ``--device`` and ``--backend`` come to: a backend of the CPU keeps ``--device auto`` off the GPU.

    Args:
        device: what ``device_option`` gave.
        backend: what ``backend_option`` gave.
        quiet: whether a GPU that was chosen by ``auto`` goes unmentioned.
    """
    import torch

    if device.type == "cpu" or not device_was_chosen():
        return device
    if backend is not Backend.AUTO:
        return torch.device("cpu")
    if not quiet:
        click.echo(f"Running on {torch.cuda.get_device_name(device)} ({device}).", err=True)
    return device
