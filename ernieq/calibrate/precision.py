"""How exactly a GPU multiplies float32 matrices: calibration takes tensor cores, its router does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


_Pass = TypeVar("_Pass", bound=_OnDevice)


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


def calibrating(
    method: Callable[Concatenate[_Pass, _Arguments], _Result],
) -> Callable[Concatenate[_Pass, _Arguments], _Result]:
    """Mark a method of a pass: no gradients, and tensor cores on a GPU."""

    @wraps(method)
    def run(self: _Pass, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with torch.no_grad(), float32_products(self.device, tensor_cores=True):
            return method(self, *arguments, **options)

    return cast("Callable[Concatenate[_Pass, _Arguments], _Result]", run)
