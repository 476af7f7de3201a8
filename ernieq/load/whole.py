"""``load_model``: a checkpoint as one torch module."""

from __future__ import annotations

from pathlib import Path

import torch

from ernieq.errors import BackendUnavailableError
from ernieq.kernels import Backend, resolve_backend
from ernieq.load.materialize import LoadOptions, materialize
from ernieq.load.source import PackedSource, open_source
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
    used, and a product decodes them as it goes. All other weights are copied as ``dtype`` (the router as
    float32).

    Args:
        path: a directory, ``bundled:NAME``, or the hub id of an ordinary checkpoint.
        device: where to put the model; packed weights run on the CPU only.
        dtype: dtype of hidden states and of the weights that are not packed.
        backend: implementation of the kernels; an ``"avx2"`` in place of ``Backend.AVX2`` will do.
        threads: threads of the kernels; all processors by default.

    Returns:
        The model in evaluation mode, every weight in place, none of them trainable.

    Raises:
        CheckpointError: a tensor is missing or malformed.
        FormatError: a packed checkpoint breaks its format, or holds a tensor that the model has no use for.
        BackendUnavailableError: the backend or device can't run it.
    """
    source = open_source(path)
    source.check_names()
    packed = isinstance(source, PackedSource)
    backend = Backend(backend)
    if packed:
        resolve_backend(backend)
        if torch.device(device).type != "cpu":
            raise BackendUnavailableError(f"packed weights run on the CPU only; device {device} was asked for")
    with torch.device("meta"):
        model = ErnieForCausalLM(source.config)
    materialize(model, expected_parameters(source.config), source, LoadOptions(dtype, backend, threads))
    return model.eval() if packed else model.eval().to(device)
