"""A quantized matrix as a torch module: buffers, and the three things that can be done with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ernieq.decode import gpu
from ernieq.errors import BackendUnavailableError, ShapeError
from ernieq.kernels import Backend
from ernieq.kernels.hadamard import rotate, unrotate
from ernieq.kernels.trellis_matmul import decode, matmul
from ernieq.trellis import TILE_SIDE, EncodedMatrix

if TYPE_CHECKING:
    from ernieq.kernels.token_step.cuda import Rotated


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

    A move to a GPU (``.to("cuda")``) turns ``packed`` into ``words`` for its kernels, (out_features / 16,
    in_features / 16, 8 K) int32; ``packed`` is None from then on, and there is no way back.

    Args:
        matrix: the encoded matrix.
        backend: implementation of the kernels.
        threads: threads of the kernels; all processors by default.
    """

    packed: Tensor
    words: Tensor
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
        self.register_buffer("words", None)
        self.register_buffer("scale", view_array(np.ascontiguousarray(matrix.scale)))
        self.register_buffer("signs", torch.tensor(matrix.signs))

    @property
    def on_gpu(self) -> bool:
        """Whether the weight is held as the words that GPU kernels read."""
        return self._buffers["words"] is not None

    def hold_words(self, words: Tensor, scale: Tensor, signs: Tensor) -> None:
        """Let go of the packed tiles and use these tensors of a GPU, which may be views of larger ones.

        Args:
            words: (out_features / 16, in_features / 16, 8 K) int32, contiguous.
            scale: (out_features,) float16.
            signs: (in_features,) int8.
        """
        self._buffers.update(packed=None, words=words, scale=scale, signs=signs)

    def move(self, device: torch.device) -> None:
        """Take the weight to a GPU; little more than its packed size is needed there."""
        words = gpu.words_of(self.packed, device)
        self.hold_words(words, self.scale.to(device), self.signs.to(device))

    def packed_tiles(self) -> Tensor:
        """The tiles as they are stored: (out_features / 16, in_features / 16, 16 K) int16, on the device."""
        return gpu.packed_of(self.words) if self.on_gpu else self.packed

    def rotate(self, x: Tensor) -> Tensor:
        """Inputs in the basis in which the matrix is quantized: (..., in_features) -> float32 of that shape."""
        return rotate(x.float(), self.signs, self.rotation_block, backend=self.backend, threads=self.threads)

    def multiply(self, x: Tensor) -> Tensor:
        """Product with inputs that are not rotated: (..., in_features) -> (..., out_features) float32."""
        if not self.on_gpu:
            return self.multiply_rotated(self.rotate(x))
        rows = x.detach().reshape(-1, self.in_features).float().contiguous()
        inputs = gpu.rotate_half(rows, self.signs, self.rotation_block)
        return self._multiply_half(inputs).view(*x.shape[:-1], self.out_features)

    def multiply_rotated(self, x_rotated: Tensor) -> Tensor:
        """Product with rotated inputs: (..., in_features) float32 -> (..., out_features) float32."""
        rows = x_rotated.reshape(-1, self.in_features)
        if self.on_gpu:
            out = self._multiply_half(gpu.halve(rows.detach()))
        else:
            out = matmul(rows, self.packed, self.scale, self.code, backend=self.backend, threads=self.threads)
        return out.view(*x_rotated.shape[:-1], self.out_features)

    def _multiply_half(self, inputs: Rotated) -> Tensor:
        return gpu.multiply(inputs, self.words, self.scale, self.code)

    def decode_rows(self, rows: slice | None = None) -> Tensor:
        """Rows of W itself, not rotated: (rows, in_features) float32.

        Args:
            rows: a range that starts and ends at multiples of 16; all by default.

        Raises:
            ShapeError: the range does not start and end there.
        """
        if self.on_gpu:
            start, stop, step = (rows or slice(None)).indices(self.out_features)
            if step != 1 or start % TILE_SIDE or stop % TILE_SIDE or stop < start:
                raise ShapeError(f"rows {start}:{stop}:{step} do not start and end at multiples of 16")
            bands = slice(start // TILE_SIDE, stop // TILE_SIDE)
            return self.unrotate(gpu.decode_exactly(self.words[bands], self.scale[start:stop], self.code))
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
            BackendUnavailableError: the conversion is a move to anything but a GPU, or away from one.
        """
        if (target := target_device(fn, self.scale.device)) is not None:
            self.move(target)
        held = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(held)
        return self


def target_device(fn: Callable[[Tensor], Tensor], device: torch.device) -> torch.device | None:
    """The GPU that a conversion of packed weights moves them to, or None if it leaves them on ``device``.

    Raises:
        BackendUnavailableError: the move is to anything but a GPU, or away from one.
    """
    target = fn(torch.empty(0, device=device)).device
    if target == device:
        return None
    if device.type != "cpu":
        raise BackendUnavailableError(
            f"packed weights can't be moved from {device} to {target}; load the model again to have it there"
        )
    if target.type != "cuda":
        raise BackendUnavailableError(
            f"packed weights can't be moved to device {target}: their kernels run on CPUs and NVIDIA GPUs"
        )
    return target
