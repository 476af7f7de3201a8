"""Where the stored tensors of a layer's matrices go, in one process of several.

A merged layer holds its parts behind each other: one flat tensor of tiles, one of scales, one of signs, and the
weights of parts that are not quantized. What was placed is kept in mind: vLLM checks that a merged parameter
was loaded, but not that all of its parts were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernieq.decode import gpu
from ernieq.errors import MissingTensorError, NonFiniteError
from ernieq.integrations.vllm.geometry import MatrixPart, part_rows, part_tiles
from ernieq.integrations.vllm.slices import MatrixSlice
from ernieq.pack import ModuleSpec

PACKED, SCALE, SIGNS, DENSE = "weight_packed", "weight_scale", "weight_signs", "weight"
_STORED = (PACKED, SCALE, SIGNS)


@dataclass(frozen=True)
class StoredPart:
    """One matrix of a layer.

    Args:
        piece: what this process holds of it.
        spec: how it is packed; None if it is not.
        padded_rows: rows that it takes up here, those that vLLM adds to a vocabulary included.
    """

    piece: MatrixSlice
    spec: ModuleSpec | None
    padded_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows that it takes up."""
        return max(self.piece.rows, self.padded_rows)

    @property
    def matrix(self) -> MatrixPart:
        """The packed matrix, as operators take it."""
        assert self.spec is not None, f"{self.piece.name} is not packed"
        return MatrixPart(self.rows, self.piece.columns, self.spec.code, self.spec.rotation_block)


class MergedStorage:
    """The tensors of a merged layer.

    Args:
        parts: its matrices in order; all have the same columns.
    """

    def __init__(self, parts: Sequence[StoredPart]) -> None:
        self.parts = list(parts)
        self.packed = [part for part in self.parts if part.spec is not None]
        self.dense = [part for part in self.parts if part.spec is None]
        self.matrices = [part.matrix for part in self.packed]
        self._placed: set[str] = set()

    def new_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Empty room on the default device, by the name of the parameter; ``dtype`` is of plain weights."""
        columns = self.parts[0].piece.columns
        tensors = {
            PACKED: torch.zeros(sum(matrix.units for matrix in self.matrices), dtype=torch.int16),
            SCALE: torch.zeros(sum(matrix.rows for matrix in self.matrices), dtype=torch.float16),
            SIGNS: torch.zeros(len(self.packed), columns // 8, dtype=torch.uint8),
        }
        if self.dense:
            tensors[DENSE] = torch.zeros(sum(part.rows for part in self.dense), columns, dtype=dtype)
        return tensors

    def place(self, name: str, data: Tensor, index: int, stored: Tensor) -> None:
        """Copy this process's slice of a stored tensor to its place.

        Args:
            name: of the parameter.
            data: its tensor, of ``new_tensors``.
            index: number of the part.
            stored: what the checkpoint holds, whole.

        Raises:
            ShapeError: it has another shape than the configuration calls for.
            MissingTensorError: it is packed and the configuration says that it is not, or the other way round.
        """
        part = self.parts[index]
        if (name == DENSE) != (part.spec is None):
            raise MissingTensorError(
                f"{part.piece.name}.{name} is in the checkpoint, but its config.json says that the module is "
                f"{'not ' if part.spec is None else ''}quantized"
            )
        self._placed.add(f"{part.piece.name}.{name}")
        if name == DENSE:
            rows = self._rows(self.dense, part)
            data[rows].copy_(part.piece.dense(stored))
            return
        number = self.packed.index(part)
        rows = part_rows(self.matrices)[number]
        if name == PACKED:
            own = part.piece.tiles(stored)
            part_tiles(data, self.matrices)[number][: own.shape[0]].copy_(own)
        elif name == SCALE:
            data[rows.start : rows.start + part.piece.rows].copy_(part.piece.scale(stored))
        else:
            data[number].copy_(part.piece.signs(stored))

    def finish(self, packed: Tensor, scale: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the operators take, once all is loaded.

        Returns:
            Tiles (int32 words if they lie on a GPU), scale, and signs: (1, C) int8, (parts, C) if they differ.

        Raises:
            MissingTensorError: a tensor of a part was not loaded.
            NonFiniteError: a scale is NaN or infinite.
        """
        check_placed(self._placed, [f"{part.piece.name}.{name}" for part in self.packed for name in _STORED])
        check_placed(self._placed, [f"{part.piece.name}.{DENSE}" for part in self.dense])
        for part, rows in zip(self.packed, part_rows(self.matrices), strict=True):
            check_scale(part.piece.name, scale[rows.start : rows.start + part.piece.rows])
        rotations = {matrix.rotation_block for matrix in self.matrices}
        signs = signs[:1] if len(rotations) == 1 and (signs == signs[:1]).all() else signs
        return gpu_words(packed), scale, unpack_signs(signs)

    def join(self, packed: Tensor, dense: Tensor) -> Tensor:
        """Outputs in the order of the parts, from those of all packed and of all plain ones: (..., R)."""
        pieces: list[Tensor] = []
        for part in self.parts:
            among, outputs = (self.packed, packed) if part.spec is not None else (self.dense, dense)
            pieces.append(outputs[..., self._rows(among, part)])
        return torch.cat(pieces, dim=-1)

    @staticmethod
    def _rows(among: Sequence[StoredPart], part: StoredPart) -> slice:
        start = sum(other.rows for other in among[: among.index(part)])
        return slice(start, start + part.piece.rows)


def check_placed(placed: Collection[str], expected: Iterable[str]) -> None:
    """Check that all tensors of a layer were loaded, or none: vLLM can run on made-up weights.

    Raises:
        MissingTensorError: one of several was not.
    """
    missing = [name for name in expected if name not in placed]
    if placed and missing:
        raise MissingTensorError(f"{missing[0]} is not in the checkpoint (is one of its files missing?)")


def check_scale(name: str, scale: Tensor) -> None:
    """Check the scale of one matrix, or of several alike.

    Raises:
        MissingTensorError: a scale is zero: nothing was loaded.
        NonFiniteError: a scale is NaN or infinite.
    """
    if not torch.isfinite(scale).all():
        raise NonFiniteError(f"{name}.{SCALE} contains NaN or infinite numbers")
    if not (scale != 0).all():
        raise MissingTensorError(f"{name}.{SCALE} is not in the checkpoint, or holds a zero, which no scale is")


def unpack_signs(signs: Tensor) -> Tensor:
    """Bits to numbers, a set bit negates: (..., C / 8) uint8 to (..., C) int8 of +-1."""
    bits = signs[..., None] >> torch.arange(8, dtype=torch.uint8, device=signs.device) & 1
    return 1 - 2 * bits.flatten(-2).to(torch.int8)


def gpu_words(packed: Tensor) -> Tensor:
    """Tiles as the kernels of their device read them: int16 units on the CPU, int32 words on a GPU."""
    return gpu.words_of(packed, packed.device) if packed.is_cuda else packed
