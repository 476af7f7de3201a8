"""Linear layers of vLLM whose matrices stay packed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearMethodBase, ReplicatedLinear, RowParallelLinear

from ernieq.integrations.vllm.geometry import part_numbers
from ernieq.integrations.vllm.operators import packed_linear
from ernieq.integrations.vllm.slices import MatrixSlice, slice_columns, slice_rows
from ernieq.integrations.vllm.storage import PACKED, SCALE, SIGNS, MergedStorage, StoredPart
from ernieq.pack import ModuleSpec

_ATTENTION_PARTS = {"q": 0, "k": 1, "v": 2}
_NO_ROTATION = 1


class ErnieqLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Products with the packed parts of a linear layer.

    Args:
        parts: the checkpoint's modules that it merges, in order, each with its code; None for a plain weight.
    """

    def __init__(self, parts: Mapping[str, ModuleSpec | None]) -> None:
        super().__init__()
        self._parts = dict(parts)

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
        """Make room for the slices of this process.

        Raises:
            UsageError: a matrix can't be cut for so many processes.
        """
        del input_size_per_partition, output_size, extra_weight_attrs
        stored = [
            StoredPart(_slice_of(layer, index, name, spec, rows, input_size), spec)
            for index, ((name, spec), rows) in enumerate(
                zip(self._parts.items(), output_partition_sizes, strict=True)
            )
        ]
        layer.packed_storage = MergedStorage(stored)
        register_storage(layer, layer.packed_storage, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all was loaded and put it in the order of the kernels."""
        finish_storage(layer, layer.packed_storage)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., C) to (..., R) of the same dtype."""
        storage: MergedStorage = layer.packed_storage
        out = multiply_storage(layer, x)
        if storage.dense:
            out = storage.join(out, functional.linear(x, layer.weight))
        return out if bias is None else out + bias


def _slice_of(
    layer: Any, index: int, name: str, spec: ModuleSpec | None, rows: int, columns: int
) -> MatrixSlice:
    """What the process of a layer holds of its part ``index``: ``rows`` of it, or all rows of some columns."""
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, ReplicatedLinear):
        rank, size = 0, 1
    if isinstance(layer, RowParallelLinear):
        block = _NO_ROTATION if spec is None else spec.rotation_block
        return slice_columns(name, rows, columns, block, rank, size)
    if index:  # k and v of attention: several processes hold one of its heads where these are fewer
        replicas = getattr(layer, "num_kv_head_replicas", 1)
        rank, size = rank // replicas, size // replicas
    return slice_rows(name, rows * size, columns, rank, size)


def register_storage(layer: Any, storage: MergedStorage, dtype: torch.dtype) -> None:
    """Give a layer the parameters of a storage, each with the loader that vLLM calls."""
    for name, tensor in storage.new_tensors(dtype).items():
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter.weight_loader = partial(_load, storage, name)  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)
    layer.packed_numbers = part_numbers(storage.matrices)


def _load(
    storage: MergedStorage, name: str, parameter: nn.Parameter, stored: Tensor, shard: str | int | None = None
) -> None:
    """Called by vLLM: ``shard`` is q, k or v, a number, or nothing where a layer has one part."""
    index = _ATTENTION_PARTS[shard] if isinstance(shard, str) else shard or 0
    storage.place(name, parameter.data, index, stored)


def multiply_storage(layer: Any, x: Tensor) -> Tensor:
    """Products with the packed parts of a layer: (..., C) to (..., R)."""
    out: Tensor = packed_linear(
        x, layer.weight_packed, layer.weight_scale, layer.weight_signs, layer.packed_numbers
    )
    return out


def finish_storage(layer: Any, storage: MergedStorage) -> None:
    """Replace what was loaded by what the operators take."""
    finished = storage.finish(layer.weight_packed.data, layer.weight_scale.data, layer.weight_signs.data)
    for name, tensor in zip((PACKED, SCALE, SIGNS), finished, strict=True):
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
