"""The Viterbi search on a GPU, equal bit for bit to ``half_reference.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ernieq.errors import BackendUnavailableError, NonFiniteError
from ernieq.kernels.cuda import CudaKernel, cuda_kernel
from ernieq.kernels.viterbi.half_reference import HALF_LIMIT, HALF_UNIT
from ernieq.trellis import TILE_WEIGHTS, TrellisCode

# Decisions of this many bytes are kept at a time, in whole waves of the GPU's multiprocessors; a smaller
# workspace costs speed only where it holds less than about three waves.
WORKSPACE_BYTES = 1 << 30
_TRACE_THREADS = 32
_DECLARED_BYTES = 2048  # at most, of shared memory that the kernel declares beside the metrics


@dataclass(frozen=True)
class Layout:
    """How a code's states are shared out among the threads of a block; ``viterbi.cu`` has the same numbers.

    Attributes:
        constants: what the source is compiled with.
        threads: threads of a block.
        words_per_step: 32-bit words of decisions that a block writes a step.
        shared_bytes: shared memory that a block is given for metrics.
    """

    constants: dict[str, int]
    threads: int
    words_per_step: int
    shared_bytes: int


def layout(code: TrellisCode, room: int) -> Layout:
    """The layout of a code where a block may have ``room`` bytes of shared memory for metrics.

    Raises:
        BackendUnavailableError: the metrics of one step need more.
    """
    even, odd = code.shifts
    values = min(64, code.states // 32)  # a warp is the smallest block
    threads = code.states // values
    held = min(1 << odd, values)  # top parts of a state that a thread holds of each of its low parts
    parts = (1 << odd) // held  # threads that share a node
    words = max(_decision_words(values // held << (odd - dropped), dropped) for dropped in (even, odd))
    padding = parts if parts > 1 else 0
    # One buffer has room for the metrics before either weight of a pair, two for both at once.
    single, other = (4 * (code.nodes_before(weight) + padding) for weight in (0, 1))
    if single > room:
        raise BackendUnavailableError(
            f"the trellis search at {code.bits_per_weight} bits needs {single // 1024} KB of shared memory in "
            f"a block, of which this GPU has {room // 1024} KB; pass more bits per weight or --device cpu"
        )
    double = single + other <= room
    return Layout(
        {
            "SHIFT_EVEN": even,
            "SHIFT_ODD": odd,
            "L": code.state_bits,
            "VALUES": values,
            "DOUBLE_BUFFER": int(double),
        },
        threads,
        words * threads // parts,
        single + other if double else single,
    )


def _decision_words(outputs: int, dropped: int) -> int:
    """Words that a thread needs for the decisions of its outputs in a step that drops some bits."""
    field = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8}.get(dropped, 16)
    return -(-outputs * field // 16)


@dataclass(frozen=True)
class _Search:
    """The two kernels of a code on a GPU, and the sizes that go with them."""

    forward: CudaKernel
    trace_back: CudaKernel
    layout: Layout
    blocks_per_wave: int


@lru_cache(maxsize=64)
def _prepared(code: TrellisCode, device: int) -> _Search:
    properties = torch.cuda.get_device_properties(device)
    room = int(properties.shared_memory_per_block_optin) - _DECLARED_BYTES  # type: ignore[attr-defined,unused-ignore]
    found = layout(code, room)
    source = Path(__file__).with_name("viterbi.cu")
    resident = max(1, min(65536 // (found.threads * 64), room // found.shared_bytes, 32))
    return _Search(
        cuda_kernel(source, "viterbi_forward", **found.constants),
        cuda_kernel(source, "viterbi_trace_back", **found.constants),
        found,
        properties.multi_processor_count * resident,
    )


def encode_tiles(
    targets: Tensor, code: TrellisCode, *, first_pass_steps: int, workspace_bytes: int = WORKSPACE_BYTES
) -> Tensor:
    """Find the ring nearest to every tile on the GPU that holds the targets (tail-biting Viterbi).

    Args:
        targets: (tiles, 256) float32 on a GPU, in value units.
        code: the trellis code.
        first_pass_steps: weights around the seam that the first pass looks at, a multiple of 4, 4 to 256.
        workspace_bytes: memory for decisions, at least that of one wave of blocks.

    Returns:
        (tiles, 256) uint8 symbols on the same GPU.

    Raises:
        NonFiniteError: a target is NaN or infinite.
        BackendUnavailableError: the GPU can't run the kernels.
    """
    if not torch.isfinite(targets).all():
        raise NonFiniteError("the targets of the trellis search contain NaN or infinite numbers")
    tiles = targets.shape[0]
    symbols = torch.empty(tiles + tiles % 2, TILE_WEIGHTS, dtype=torch.uint8, device=targets.device)
    with torch.cuda.device(targets.device):
        search = _prepared(code, torch.cuda.current_device())
        words = _paired_words(targets)
        pair_bytes = 4 * search.layout.words_per_step * TILE_WEIGHTS
        waves = max(1, workspace_bytes // (pair_bytes * search.blocks_per_wave))
        chunk = min(words.shape[0], waves * search.blocks_per_wave)
        survivors = torch.empty(chunk * pair_bytes // 4, dtype=torch.int32, device=targets.device)
        for start in range(0, words.shape[0], chunk):
            part = slice(start, min(start + chunk, words.shape[0]))
            _encode_chunk(
                search, words[part], survivors, symbols[2 * part.start : 2 * part.stop], first_pass_steps
            )
    return symbols[:tiles]


def _paired_words(targets: Tensor) -> Tensor:
    """Negated float16 targets of tile pairs: (tiles, 256) float32 -> (pairs, 256) int32, even tile low."""
    rounded = -(targets * (1 / HALF_UNIT)).clamp(-HALF_LIMIT, HALF_LIMIT).half()
    if rounded.shape[0] % 2:
        rounded = torch.cat((rounded, rounded[-1:]))
    bits = rounded.view(torch.int16).view(-1, 2, TILE_WEIGHTS)
    return torch.stack((bits[:, 0], bits[:, 1]), dim=-1).contiguous().view(torch.int32).squeeze(-1)


def _encode_chunk(search: _Search, words: Tensor, survivors: Tensor, symbols: Tensor, first_pass: int) -> None:
    pairs, tiles, half = words.shape[0], 2 * words.shape[0], first_pass // 2
    last = torch.empty(tiles, dtype=torch.int32, device=words.device)
    boundary = torch.empty_like(last)
    trace_grid = (-(-tiles // _TRACE_THREADS),)

    def forward(start: Tensor | None, best: Tensor | None, first: int, steps: int, keep_from: int) -> None:
        search.forward(
            (pairs,), search.layout.threads, words, start, survivors, best, None, first, steps, keep_from,
            shared_bytes=search.layout.shared_bytes,
        )  # fmt: skip

    forward(None, last, TILE_WEIGHTS - half, first_pass, half)
    search.trace_back(trace_grid, _TRACE_THREADS, survivors, last, boundary, None, tiles, half)
    forward(boundary, None, 0, TILE_WEIGHTS, 0)
    search.trace_back(trace_grid, _TRACE_THREADS, survivors, boundary, None, symbols, tiles, TILE_WEIGHTS)
