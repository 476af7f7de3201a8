"""Compile CUDA C++ with NVRTC and launch it on torch's current stream.

NVRTC and the driver's loader come through ``cuda-core``; torch's CUDA wheels bring NVRTC itself, so a user
needs no compiler. The sources need no header of CUDA. A kernel is compiled once per process, GPU kind and set
of constants (a second or less), when it is first used.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernieq.errors import BackendUnavailableError

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_HERE = Path(__file__).parent
# A block gets 48 KB of shared memory without asking, what the kernel itself declares included.
_SHARED_BYTES_UNASKED = 32 * 1024


class CudaKernel:
    """A compiled kernel that launches on torch's current stream.

    Args:
        core: the module ``cuda.core``.
        kernel: its kernel object.
    """

    def __init__(self, core: Any, kernel: Any) -> None:
        self._core = core
        self._kernel = kernel
        self._configurations: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, ...], block: int, *arguments: Tensor | int | float | None, shared_bytes: int = 0
    ) -> None:
        """Launch: tensors go as their addresses, None as a null pointer, ints as int32, floats as float32.

        Raises:
            BackendUnavailableError: the GPU can't run the kernel (too little shared memory, say).
        """
        key = (grid, block, shared_bytes)
        configuration = self._configurations.get(key)
        if configuration is None:
            if shared_bytes > _SHARED_BYTES_UNASKED:
                allow_shared_bytes(self._kernel, shared_bytes)
            configuration = self._core.LaunchConfig(grid=grid, block=(block, 1, 1), shmem_size=shared_bytes)
            self._configurations[key] = configuration
        stream = _stream(torch.cuda.current_stream().cuda_stream)
        self._core.launch(stream, configuration, self._kernel, *map(_argument, arguments))


@lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    return _core().Stream.from_handle(handle)


def _argument(value: Tensor | int | float | None) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return np.float32(value) if isinstance(value, float) else np.int32(value)


def allow_shared_bytes(kernel: Any, shared_bytes: int) -> None:
    """Let blocks of a kernel have more than the 48 KB of dynamic shared memory that they get unasked."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(
        attribute,
        shared_bytes,
        driver.CUkernel(int(kernel.handle)),
        driver.CUdevice(torch.cuda.current_device()),
    )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendUnavailableError(
            f"this GPU refuses a block {shared_bytes} bytes of shared memory ({status.name}); pass --device cpu"
        )


@cache
def _core() -> Any:
    try:
        import cuda.core as core

        if not hasattr(core, "Program"):
            import cuda.core.experimental as core
    except ImportError as error:
        raise BackendUnavailableError(
            f"the GPU kernels need the package cuda-core ({error}); install it (pip install 'ernieq[cuda]') "
            "or pass --device cpu"
        ) from error
    return core


def cuda_kernel(source: Path, name: str, /, **constants: int) -> CudaKernel:
    """The kernel ``name`` of a source file for the current GPU, compiled when it is first asked for.

    Args:
        source: a ``.cu`` file; it may include the ``.cuh`` files beside this module.
        name: an ``extern "C"`` kernel in it.
        constants: preprocessor constants.

    Raises:
        BackendUnavailableError: cuda-core is missing, or the source does not compile for this GPU.
    """
    return _compiled(torch.cuda.current_device(), source, name, **constants)


@lru_cache(maxsize=256)
def _compiled(device: int, source: Path, name: str, /, **constants: int) -> CudaKernel:
    core = _core()
    core.Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    text = _INCLUDE.sub(lambda match: (_HERE / match[1]).read_text(encoding="utf-8"), source.read_text("utf-8"))
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    options = core.ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    try:
        program = core.Program(defines + text, "c++", options)
        kernel = program.compile("cubin").get_kernel(name)
    except Exception as error:  # cuda-core raises several unrelated classes; all mean the same here
        raise BackendUnavailableError(
            f"the kernel {name} does not compile for compute capability {major}.{minor}: {error}"
        ) from error
    return CudaKernel(core, kernel)
