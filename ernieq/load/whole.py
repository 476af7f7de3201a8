"""``load_model``: a checkpoint as one torch module."""

from __future__ import annotations

from pathlib import Path

import torch

from ernieq.kernels import Backend
from ernieq.kernels.device import require_memory
from ernieq.load.materialize import LoadOptions, materialize
from ernieq.load.memory import model_bytes
from ernieq.load.place import resolve_place
from ernieq.load.source import open_source
from ernieq.model import ErnieForCausalLM, expected_parameters


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
) -> ErnieForCausalLM:
    """Load a packed or an ordinary checkpoint for inference.

    Packed matrices stay packed: they are views of the mapped files, which the system reads when they are first
    used, and a product decodes them as it goes. On a GPU they are copied, and stay packed there, too. All other
    weights are copied as ``dtype`` (the router as float32).

    Args:
        path: a directory, ``bundled:NAME``, or a hub id; packed or ordinary.
        device: where to put the model: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` for a GPU if there is one.
        dtype: dtype of hidden states and of the weights that are not packed.
        backend: implementation of the kernels on the CPU; an ``"avx2"`` in place of ``Backend.AVX2`` will do.
        threads: threads of the kernels; all processors by default.

    Returns:
        The model in evaluation mode, every weight in place, none of them trainable.

    Raises:
        CheckpointError: a tensor is missing or malformed.
        FormatError: a packed checkpoint breaks its format, or holds a tensor that the model has no use for.
        UsageError: the device means nothing, or a backend of the CPU was asked for together with a GPU.
        BackendUnavailableError: the backend or device can't run it, or the GPU has too little memory.
    """
    place = resolve_place(device, Backend(backend))
    source = open_source(path)
    source.check_names()
    place.check(source)
    require_memory(place.device, model_bytes(source, dtype), f"the model in {path}")
    with torch.device("meta"):
        model = ErnieForCausalLM(source.config)
    options = LoadOptions(dtype, place.backend, threads, place.device)
    materialize(model, expected_parameters(source.config), source, options)
    return model.eval()
