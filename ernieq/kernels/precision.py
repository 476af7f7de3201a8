"""How exactly a GPU multiplies float32 matrices, and in which order a CPU factors them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_FEW_ROWS = 256


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


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let a CPU work with one thread where the order of the sums would be that of the number of threads.

    LAPACK's factoring and solving is such, and products with few rows. Other products of matrices and sums
    along an axis need no such care: threads share out their results, not the terms of a sum. The setting is
    the process's and is put back at the end.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def steady_products(rows: int, device: torch.device) -> Iterator[None]:
    """Let products with so many rows be the same for any number of threads.

    MKL takes another kernel for 5 to 7 and 9 to 11 rows if it has two threads; the bound leaves room for more.
    """
    if rows >= _FEW_ROWS:
        yield
        return
    with one_thread(device):
        yield


@contextmanager
def steady_modules(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """``steady_products`` for whatever rows these modules are called with meanwhile."""
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) < _FEW_ROWS:
            torch.set_num_threads(1)

    def after(*_: object) -> None:
        torch.set_num_threads(threads)

    hooks = []
    for module in modules:
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_num_threads(threads)
