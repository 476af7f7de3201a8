"""A tensor of a shard as torch sees it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ernieq.checkpoint.shard import Shard, ShardEntry

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


def read_tensor(shard: Shard, entry: ShardEntry) -> Tensor:
    """A tensor, in memory of its own.

    Raises:
        SourceChangedError: the file is gone, or no longer the one that was opened.
    """
    tensor = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
    if tensor.numel():
        shard.read_into(entry, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


def view_tensor(shard: Shard, entry: ShardEntry) -> Tensor:
    """A tensor on the read-only mapping of its file; writing into it would crash the process.

    Raises:
        CheckpointError: the file can't be mapped.
    """
    stored = _TORCH_DTYPES[entry.dtype]
    if 0 in entry.shape:
        return torch.empty(entry.shape, dtype=stored)
    count = (entry.end - entry.begin) // stored.itemsize
    if entry.begin % stored.itemsize:  # legal in the format, but no processor likes it: copy
        copy = bytearray(memoryview(shard.mapping())[entry.begin : entry.end])
        return torch.frombuffer(copy, dtype=stored).view(entry.shape)
    with warnings.catch_warnings():  # torch has no read-only tensors and says so
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(shard.mapping(), dtype=stored, count=count, offset=entry.begin)
    return flat.view(entry.shape)
