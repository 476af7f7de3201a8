"""Where a conversion works: the CPU, or a GPU and how its memory is shared out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch

from ernieq.calibrate import Streams, stay_on_gpu
from ernieq.encode import Batches, out_of_memory, working_bytes
from ernieq.errors import BackendUnavailableError
from ernieq.kernels.device import require_memory
from ernieq.model import ModelConfig, expected_parameters

FREE_SHARE = 0.9
_FLOAT32, _NARROW = 4, 2

# Held beside layer, streams and matrices at work: decisions of the trellis search (1.1 GB), activations of a
# batch of tokens.
_OTHER_BYTES = 2_000_000_000
# What matrices at work are given all the same; the batches shrink if it is not there.
_LEAST_BYTES = 500_000_000


@dataclass(frozen=True)
class Workplace:
    """A device, and the bytes of its memory that may be used; None on the CPU, which has no such bound."""

    device: torch.device
    vram_bytes: int | None

    @classmethod
    def on(cls, device: torch.device, vram_bytes: int | None = None) -> Workplace:
        """A workplace, by default with 90 % of the GPU memory that is free.

        Raises:
            BackendUnavailableError: the GPU has less memory free than is asked for.
        """
        if device.type == "cpu":
            return cls(device, None)
        if vram_bytes is None:
            return cls(device, int(FREE_SHARE * torch.cuda.mem_get_info(device)[0]))
        require_memory(device, vram_bytes, "the --vram that was given")
        return cls(device, vram_bytes)

    @property
    def is_gpu(self) -> bool:
        """Whether a GPU does the work."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """``cpu``, or what the GPU is called."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"

    @property
    def search_arithmetic(self) -> str:
        """What the trellis search counts in; it decides between paths that are nearly equal."""
        return "float16" if self.is_gpu else "int16"

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Keep this process within the memory it was given.

        Raises:
            BackendUnavailableError: in place of torch.OutOfMemoryError, where no smaller batch would help.
        """
        if self.vram_bytes is None:
            yield
            return
        total = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.vram_bytes / total), self.device)
        failure: BackendUnavailableError | None = None
        try:
            yield
        except torch.OutOfMemoryError:
            failure = out_of_memory()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            torch.cuda.empty_cache()
        if failure is not None:
            raise failure

    def place(self, streams: Streams) -> Streams:
        """Streams for this device: in its memory if they leave enough of it, else pinned in the processor's."""
        if self.vram_bytes is None:
            return streams
        windows, length, width = streams.shape
        return streams.placed(self.device, resident=stay_on_gpu(windows * length, width, self.vram_bytes))

    def encoding_bytes(self, config: ModelConfig, tokens: int) -> int | None:
        """Memory for matrices at work, beside the largest layer and the streams of so many tokens."""
        if self.vram_bytes is None:
            return None
        held = _NARROW * largest_layer(config) + _OTHER_BYTES
        if stay_on_gpu(tokens, config.hidden_size, self.vram_bytes):
            held += int(Streams.bytes_held(tokens, config.hidden_size))
        return max(_LEAST_BYTES, self.vram_bytes - held)

    def expert_batches(self, config: ModelConfig, tokens: int, on_notice: Callable[[str], None]) -> Batches:
        """How many experts are worked on at once: one on the CPU, as many as fit on a GPU."""
        room = self.encoding_bytes(config, tokens)
        if room is None or not config.moe_num_experts:
            return Batches(1, "experts", on_notice)
        return Batches(room // _expert_bytes(config), "experts", on_notice)


def largest_layer(config: ModelConfig) -> int:
    """Parameters of the largest decoder layer."""
    layers: dict[str, int] = {}
    for name, spec in expected_parameters(config).items():
        if name.startswith("model.layers."):
            key = name.split(".")[2]
            layers[key] = layers.get(key, 0) + prod(spec.shape)
    return max(layers.values())


def _expert_bytes(config: ModelConfig) -> int:
    """Memory of one expert at work: gate and up with their moments, or down with its two moments."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    first = working_bytes(2 * inner, hidden) + _FLOAT32 * hidden**2
    moments = 2 * _FLOAT32 * inner * (inner + hidden)
    second = working_bytes(hidden, inner) + moments + _NARROW * 2 * inner * hidden
    return max(first, second)
