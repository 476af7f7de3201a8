"""How exactly a GPU multiplies float32 matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(device: torch.device, *, tensor_cores: bool) -> Iterator[None]:
    """Let products of float32 matrices keep 10 bits of a mantissa (TF32) or all; a CPU keeps all anyway.

    The setting is the process's: it is put back at the end, and left alone where the CPU works.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tensor_cores
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
