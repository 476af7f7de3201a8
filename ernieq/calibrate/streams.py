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


def stream_dtype(tokens: int, hidden_size: int) -> torch.dtype:
    """Dtype in which the streams are kept between layers."""
    fits = 2 * 4 * tokens * hidden_size <= FLOAT32_LIMIT_BYTES
    return torch.float32 if fits else torch.bfloat16


@dataclass
class Streams:
    """Hidden states between two sub-layers.

    Args:
        reference: (windows, length, hidden_size), of the bf16 model.
        quantized: same shape, of the model whose weights so far are quantized.
    """

    reference: Tensor
    quantized: Tensor

    @property
    def shape(self) -> torch.Size:
        """(windows, length, hidden_size)."""
        return self.reference.shape

    def batches(self) -> Iterator[slice]:
        """Slices of windows that together hold a few thousand tokens."""
        step = max(1, TOKENS_PER_BATCH // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def rows(self, stream: Tensor, index: Tensor) -> Tensor:
        """Hidden states of tokens by their flat index: (tokens, hidden_size) float32."""
        return stream.reshape(-1, self.shape[2])[index].float()
