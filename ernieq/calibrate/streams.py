"""Hidden states of all calibration tokens, in two streams: the bf16 model's and the quantized prefix's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Above this many bytes the two streams are kept in bfloat16; a rule of sizes alone, so that bytes don't depend
# on the machine. 4 GB is a sixth of the memory that a conversion of the 21B model is planned for.
FLOAT32_LIMIT_BYTES = 4_000_000_000
TOKENS_PER_BATCH = 4096
TOKENS_PER_GPU_BATCH = 8192  # 400 MB for one float32 activation of the 21B model's dense layer
STREAMS_HELD = 4  # both before a sub-layer and both behind it
GPU_SHARE = 0.4  # of the GPU memory, which the streams may take; beyond it they stay with the processor


def stream_dtype(tokens: int, hidden_size: int) -> torch.dtype:
    """Dtype in which the streams are kept between layers."""
    fits = 2 * 4 * tokens * hidden_size <= FLOAT32_LIMIT_BYTES
    return torch.float32 if fits else torch.bfloat16


def stay_on_gpu(tokens: int, hidden_size: int, vram_bytes: int) -> bool:
    """Whether all streams of a sample may lie in GPU memory."""
    return Streams.bytes_held(tokens, hidden_size) <= GPU_SHARE * vram_bytes


@dataclass
class Streams:
    """Hidden states between two sub-layers.

    Args:
        reference: (windows, length, hidden_size), of the bf16 model.
        quantized: same shape, of the model whose weights so far are quantized.
        worker: the device that computes; the streams themselves may lie in the processor's memory and are then
            moved batch by batch. Where the streams lie, unless given.
    """

    reference: Tensor
    quantized: Tensor
    worker: torch.device | None = None

    @staticmethod
    def bytes_held(tokens: int, hidden_size: int) -> int:
        """Bytes of all streams that are held at a time."""
        return STREAMS_HELD * tokens * hidden_size * stream_dtype(tokens, hidden_size).itemsize

    @property
    def shape(self) -> torch.Size:
        """(windows, length, hidden_size)."""
        return self.reference.shape

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.worker or self.reference.device

    @property
    def resident(self) -> bool:
        """Whether the streams lie on the device that computes."""
        return self.device == self.reference.device

    def placed(self, worker: torch.device, *, resident: bool) -> Streams:
        """The same streams for a device that computes, moved there or kept in pinned memory."""
        if resident:
            return Streams(self.reference.to(worker), self.quantized.to(worker))
        return Streams(_pinned(self.reference), _pinned(self.quantized), worker)

    def clone(self) -> Streams:
        """A copy in the same place."""
        copied = self.empty(self.shape[2])
        self.wait()
        copied.reference.copy_(self.reference)
        copied.quantized.copy_(self.quantized)
        return copied

    def empty(self, width: int) -> Streams:
        """Streams of the same tokens, place and dtype, ``width`` wide, not filled."""
        like, shape = self.reference, (*self.shape[:2], width)
        pinned = like.is_pinned() if not self.resident else False

        def room() -> Tensor:
            return torch.empty(shape, dtype=like.dtype, device=like.device, pin_memory=pinned)

        return Streams(room(), room(), self.worker)

    def wait(self) -> None:
        """Wait until what the device writes into the processor's memory is there."""
        if not self.resident and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def batches(self) -> Iterator[slice]:
        """Slices of windows that together hold a few thousand tokens."""
        tokens = TOKENS_PER_GPU_BATCH if self.device.type == "cuda" else TOKENS_PER_BATCH
        step = max(1, tokens // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def load(self, stream: Tensor, where: slice) -> Tensor:
        """Part of one of the streams on the device that computes, in its own dtype; the stream itself there."""
        return stream[where].to(self.device, non_blocking=True)

    def store(self, stream: Tensor, where: slice, values: Tensor) -> None:
        """Put values of any dtype, from the device that computes, into part of one of the streams."""
        stream[where].copy_(values.to(stream.dtype), non_blocking=True)

    def add(self, stream: Tensor, where: slice, values: Tensor) -> None:
        """Add to part of one of the streams."""
        part = self.load(stream, where)
        part += values.to(stream.dtype)
        if not self.resident:
            self.store(stream, where, part)

    def rows(self, stream: Tensor, index: Tensor) -> Tensor:
        """Hidden states of tokens by flat index: (tokens, hidden_size) float32 on the device that computes."""
        self.wait()
        chosen = stream.reshape(-1, self.shape[2])[index.to(stream.device)]
        return chosen.to(self.device).float()


def _pinned(stream: Tensor) -> Tensor:
    """In memory that a GPU can fetch from on its own; as it is where the system grants no such memory."""
    if not torch.cuda.is_available():
        return stream
    try:
        return stream.cpu().pin_memory()
    except RuntimeError:
        return stream.cpu()
