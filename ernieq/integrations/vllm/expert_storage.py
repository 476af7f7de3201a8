"""Where the stored tensors of a layer's routed experts go, in one process of several.

Shapes: E experts that the process holds, H hidden width, I what it holds of an expert's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from ernieq.errors import MissingTensorError, UnsupportedModelError
from ernieq.integrations.vllm.geometry import MatrixPart
from ernieq.integrations.vllm.slices import MatrixSlice, slice_columns, slice_rows
from ernieq.integrations.vllm.storage import PACKED, SCALE, SIGNS, check_scale, gpu_words, unpack_signs
from ernieq.pack import ModuleSpec
from ernieq.trellis import TILE_SIDE

_SHARDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class ExpertStorage:
    """The tensors of all experts; gate lies above up.

    Args:
        name: ``model.layers.3.mlp.experts``.
        specs: the code of gate and up, and that of down.
        experts: E.
        hidden: H.
        width: width of a whole expert.
        rank: number of this process.
        size: number of processes that share each expert.

    Raises:
        UsageError: an expert can't be cut for so many processes.
    """

    def __init__(
        self,
        name: str,
        specs: tuple[ModuleSpec, ModuleSpec],
        experts: int,
        hidden: int,
        width: int,
        rank: int,
        size: int,
    ) -> None:
        self._name = name
        self._experts = experts
        self._placed: set[str] = set()
        reader, writer = specs
        self._slices: dict[str, MatrixSlice] = {
            shard: slice_rows(f"{name}.*.{_SHARDS[shard]}", width, hidden, rank, size) for shard in ("w1", "w3")
        }
        self._slices["w2"] = slice_columns(
            f"{name}.*.down_proj", hidden, width, writer.rotation_block, rank, size
        )
        self._width = self._slices["w1"].rows
        self.gate_up = MatrixPart(2 * self._width, hidden, reader.code, reader.rotation_block)
        self.down = MatrixPart(hidden, self._width, writer.code, writer.rotation_block)

    def new_tensors(self) -> dict[str, Tensor]:
        """Empty room on the current default device, by the name of the parameter."""
        tensors = {}
        for prefix, matrix, readers in (("w13", self.gate_up, 2), ("w2", self.down, 1)):
            shape = (self._experts, *matrix.tile_shape)
            tensors[f"{prefix}_{PACKED}"] = torch.zeros(shape, dtype=torch.int16)
            tensors[f"{prefix}_{SCALE}"] = torch.zeros(self._experts, matrix.rows, dtype=torch.float16)
            signs = torch.zeros(self._experts, readers, matrix.columns // 8, dtype=torch.uint8)
            tensors[f"{prefix}_{SIGNS}"] = signs
        return tensors

    def place(self, name: str, data: Tensor, expert: int, shard: str, stored: Tensor) -> None:
        """Copy this process's slice of a stored tensor to its place.

        Args:
            name: of the parameter, ``w13_weight_packed``.
            data: its tensor, of ``new_tensors``.
            expert: number of the expert among those of this process.
            shard: w1 (gate), w3 (up) or w2 (down).
            stored: what the checkpoint holds of one matrix, whole.

        Raises:
            ShapeError: it has another shape than the configuration calls for.
        """
        piece, second = self._slices[shard], shard == "w3"
        self._placed.add(f"{expert}.{shard}.{name.partition('_')[2]}")
        if name.endswith(SIGNS):
            data[expert, int(second)].copy_(piece.signs(stored))
            return
        own = piece.tiles(stored) if name.endswith(PACKED) else piece.scale(stored)
        above = self._width // (TILE_SIDE if name.endswith(PACKED) else 1) if second else 0
        data[expert, above : above + own.shape[0]].copy_(own)

    def finish(
        self, prefix: str, packed: Tensor, scale: Tensor, signs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the operator takes, once all is loaded; arguments are those of ``new_tensors``.

        Returns:
            Tiles (int32 words if they lie on a GPU), scale, and the one row of signs, (C,) int8.

        Raises:
            MissingTensorError: a tensor of an expert was not loaded.
            NonFiniteError: a scale is NaN or infinite.
            UnsupportedModelError: the signs of two experts differ.
        """
        what = f"{self._name}.*.{'gate_proj or up_proj' if prefix == 'w13' else 'down_proj'}"
        self._check_placed(("w1", "w3") if prefix == "w13" else ("w2",))
        check_scale(what, scale)
        rows = signs.flatten(0, 1)
        if not (rows == rows[:1]).all():
            raise UnsupportedModelError(
                f"{what}.{SIGNS} differs between experts; vLLM rotates a token once for all of them, "
                "as ernieq's own checkpoints allow"
            )
        return gpu_words(packed), scale, unpack_signs(rows[0])

    def _check_placed(self, shards: Sequence[str]) -> None:
        """Check that all tensors of all experts were loaded, or none: vLLM can run on made-up weights."""
        for expert, shard, name in product(range(self._experts), shards, (PACKED, SCALE, SIGNS)):
            if self._placed and f"{expert}.{shard}.{name}" not in self._placed:
                raise MissingTensorError(
                    f"a {_SHARDS[shard]}.{name} of {self._name} is not in the checkpoint "
                    "(is one of its files missing?)"
                )
