"""A quantized matrix as a torch module: buffers, and the three things that can be done with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ernieq.errors import BackendUnavailableError
from ernieq.kernels import Backend
from ernieq.kernels.hadamard import rotate, unrotate
from ernieq.kernels.trellis_matmul import decode, matmul
from ernieq.trellis import EncodedMatrix


def view_array(array: NDArray[Any]) -> Tensor:
    """A tensor on the memory of an array, which may be a read-only map of a file.

    Nothing is copied. Writing to a tensor on a read-only map kills the process; packed weights are never
    written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class TrellisWeight(nn.Module):
    """Base of the modules that hold one quantized matrix ``W = diag(scale) (values / 128) R``.

    The buffers ``packed`` (int16) and ``scale`` (float16) are views of the arrays given, so that a mapped file
    is read when it is needed and counts once; ``signs`` (int8) are a copy. They keep their dtypes whatever the
    module is converted to.

    Args:
        matrix: the encoded matrix.
        backend: implementation of the kernels.
        threads: threads of the kernels; all processors by default.
    """

    packed: Tensor
    scale: Tensor
    signs: Tensor

    def __init__(
        self, matrix: EncodedMatrix, *, backend: Backend = Backend.AUTO, threads: int | None = None
    ) -> None:
        super().__init__()
        self.out_features = matrix.out_features
        self.in_features = matrix.in_features
        self.code = matrix.code
        self.rotation_block = matrix.rotation_block
        self.backend = backend
        self.threads = threads
        self.register_buffer("packed", view_array(np.ascontiguousarray(matrix.packed)))
        self.register_buffer("scale", view_array(np.ascontiguousarray(matrix.scale)))
        self.register_buffer("signs", torch.tensor(matrix.signs))

    def rotate(self, x: Tensor) -> Tensor:
        """Inputs in the basis in which the matrix is quantized: (..., in_features) -> float32 of that shape."""
        return rotate(x.float(), self.signs, self.rotation_block, backend=self.backend, threads=self.threads)

    def multiply_rotated(self, x_rotated: Tensor) -> Tensor:
        """Product with rotated inputs: (..., in_features) float32 -> (..., out_features) float32."""
        rows = x_rotated.reshape(-1, self.in_features)
        out = matmul(rows, self.packed, self.scale, self.code, backend=self.backend, threads=self.threads)
        return out.view(*x_rotated.shape[:-1], self.out_features)

    def decode_rows(self, rows: slice | None = None) -> Tensor:
        """Rows of W itself, not rotated: (rows, in_features) float32.

        Args:
            rows: a range that starts and ends at multiples of 16; all by default.
        """
        rotated = decode(
            self.packed, self.scale, self.code, rows=rows, backend=self.backend, threads=self.threads
        )
        return self.unrotate(rotated)

    def unrotate(self, rows: Tensor) -> Tensor:
        """Rows of the quantized matrix in the basis of the inputs: (..., in_features) float32."""
        return unrotate(rows, self.signs, self.rotation_block, backend=self.backend, threads=self.threads)

    def extra_repr(self) -> str:
        """Sizes and code, as torch prints them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.code.bits_per_weight}, state_bits={self.code.state_bits}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply a conversion (``.to``, ``.half``) to all but the buffers, whose dtypes are part of the code.

        Raises:
            BackendUnavailableError: the conversion is a move away from the CPU.
        """
        if fn(torch.empty(0)).device.type != "cpu":
            raise BackendUnavailableError(
                "packed weights can't be moved to another device: their kernels run on the CPU"
            )
        held = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(held)
        return self
