"""vLLM's embedding and head, whose table stays packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ernieq.errors import UsageError
from ernieq.integrations.vllm.linear import finish_storage, multiply_storage, register_storage
from ernieq.integrations.vllm.operators import packed_rows
from ernieq.integrations.vllm.slices import MatrixSlice
from ernieq.integrations.vllm.storage import MergedStorage, StoredPart
from ernieq.pack import ModuleSpec
from ernieq.trellis import TILE_SIDE


class ErnieqEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Rows of a packed table by number, and products with all of them.

    Args:
        name: of the matrix in the checkpoint.
        spec: its code.
        own_weight: False for a head that is tied to the embedding and has no matrix of its own.
    """

    def __init__(self, name: str, spec: ModuleSpec, *, own_weight: bool) -> None:
        super().__init__()
        self._name = name
        self._spec = spec
        self._own_weight = own_weight

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for the rows of this process, those that vLLM adds to the vocabulary included.

        Raises:
            UsageError: the vocabulary can't be cut for so many processes.
        """
        del input_size_per_partition, output_size, extra_weight_attrs
        if not self._own_weight:
            return
        part = StoredPart(_slice_of(layer, self._name, input_size), self._spec, sum(output_partition_sizes))
        layer.params_dtype_of_rows = params_dtype
        layer.packed_storage = MergedStorage([part])
        register_storage(layer, layer.packed_storage, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded and put it in the order of the kernels."""
        if self._own_weight:
            finish_storage(layer, layer.packed_storage)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """(...) int64 to (..., C)."""
        rows: Tensor = packed_rows(
            input_,
            layer.weight_packed,
            layer.weight_scale,
            layer.weight_signs,
            layer.packed_numbers,
            layer.params_dtype_of_rows,
        )
        return rows

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits: (..., C) to (..., R) of the same dtype."""
        out = multiply_storage(layer, x)
        return out if bias is None else out + bias

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """The embedding serves as the head: one layer, so that its tiles are held, and put in order, once."""
        del layer
        return embed_tokens


def _slice_of(layer: Any, name: str, columns: int) -> MatrixSlice:
    indices = layer.shard_indices
    start, stop = indices.org_vocab_start_index, indices.org_vocab_end_index
    if start % TILE_SIDE or stop % TILE_SIDE:
        raise UsageError(
            f"{name} can't be cut for {layer.tp_size} tensor-parallel processes: its {layer.org_vocab_size} "
            f"rows would be cut within a tile of {TILE_SIDE}; pass another --tensor-parallel-size"
        )
    return MatrixSlice(name, layer.org_vocab_size, columns, start, stop - start, 0, columns)
