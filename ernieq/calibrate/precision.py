"""What the passes of calibration share: no gradients, and tensor cores on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

import torch

from ernieq.kernels.precision import float32_products

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


_Pass = TypeVar("_Pass", bound=_OnDevice)


def calibrating(
    method: Callable[Concatenate[_Pass, _Arguments], _Result],
) -> Callable[Concatenate[_Pass, _Arguments], _Result]:
    """Mark a method of a pass: no gradients, and tensor cores on a GPU."""

    @wraps(method)
    def run(self: _Pass, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with torch.no_grad(), float32_products(self.device, tensor_cores=True):
            return method(self, *arguments, **options)

    return cast("Callable[Concatenate[_Pass, _Arguments], _Result]", run)
