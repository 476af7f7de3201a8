"""The GPU's sources, compiled for the processor and run there: their arithmetic of places, without a GPU.

``cuda_on_cpu.hpp`` stands for the compiler's intrinsics; the kernels and what launches them are the real ones.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ernieq.kernels
from ernieq.errors import BackendUnavailableError
from ernieq.kernels.trellis_matmul.cuda import to_words
from ernieq.kernels.viterbi import cuda as viterbi
from ernieq.kernels.viterbi import half_reference
from ernieq.trellis import RATES, TrellisCode, tile_values

KERNELS = Path(ernieq.kernels.__file__).parent
H100_ROOM, A100_ROOM, CONSUMER_ROOM = ((kb << 10) - 2048 for kb in (227, 163, 99))

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the GPU's sources with")

SEARCH = """
extern "C" void forward(const u32* targets, const int* start, u32* survivors, int* best, int first, int steps,
                        int keep_from, int pairs) {
    for (blockIdx.x = 0; blockIdx.x < (unsigned)pairs; ++blockIdx.x)
        fibers::run_block(kThreads, [=] {
            viterbi_forward(targets, start, survivors, best, nullptr, first, steps, keep_from);
        });
}
extern "C" void trace_back(const u32* survivors, const int* last, int* boundary, u8* symbols, int tiles,
                           int steps) {
    blockDim.x = 1;
    for (blockIdx.x = 0, threadIdx.x = 0; blockIdx.x < (unsigned)tiles; ++blockIdx.x)
        viterbi_trace_back(survivors, last, boundary, symbols, tiles, steps);
}
"""
DECODE = """
extern "C" void decode(const u32* words, u32* values, int tiles) {
    for (int tile = 0; tile < tiles; ++tile)
        for (int lane = 0; lane < 32; ++lane) {
            half2_bits found[4];
            WindowReader reader(words, lane);
            reader.advance(tile / 2);
            decode_window(reader.load(tile - tile / 2), lane, found);
            std::memcpy(values + (tile * 32 + lane) * 4, found, sizeof found);
        }
}
"""


def compiled(folder: Path, constants: dict[str, int], source: str) -> Any:
    """A source with constants as a library of the processor."""
    text = re.sub(r'#include "half2.cuh"', f'#include "{Path(__file__).with_name("cuda_on_cpu.hpp")}"', source)
    text = text.replace("extern __shared__ __align__(16) u32 metrics[];", "static u32 metrics[1 << 16];")
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    path = folder / f"{'_'.join(map(str, constants.values()))}.cpp"
    path.write_text(defines + text, encoding="utf-8")
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o"]
    subprocess.run([*command, str(path.with_suffix(".so")), str(path)], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so")))


def search_on_cpu(targets: Tensor, code: TrellisCode, room: int, first_pass: int, folder: Path) -> Tensor:
    """``cuda.encode_tiles`` with the kernels of the processor in place of the GPU's."""
    found = viterbi.layout(code, room)
    library = compiled(folder, found.constants, (KERNELS / "viterbi/viterbi.cu").read_text("utf-8") + SEARCH)

    def address(value: Tensor | int | None) -> Any:
        return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value

    def forward(grid: tuple[int], threads: int, *arguments: Any, shared_bytes: int) -> None:
        words, start, survivors, best, none, first, steps, keep_from = map(address, arguments)
        assert none is None
        assert shared_bytes <= room
        library.forward(words, start, survivors, best, first, steps, keep_from, *grid)

    def trace_back(grid: tuple[int], threads: int, *arguments: Any) -> None:
        library.trace_back(*map(address, arguments))

    words = viterbi._paired_words(targets)
    symbols = torch.empty(2 * words.shape[0], 256, dtype=torch.uint8)
    survivors = torch.empty(words.shape[0] * 256 * found.words_per_step, dtype=torch.int32)
    search: Any = SimpleNamespace(forward=forward, trace_back=trace_back, layout=found)
    viterbi._encode_chunk(search, words, survivors, symbols, first_pass)
    return symbols[: targets.shape[0]]


@pytest.mark.parametrize(
    ("bits", "state_bits", "room"),
    [
        (1.5, 12, H100_ROOM),
        (1.5, 11, 1 << 12),  # one buffer for both kinds of steps
        (2, 12, H100_ROOM),
        (2.5, 11, H100_ROOM),
        (2.5, 10, 1 << 10),
        (3.5, 11, H100_ROOM),
        (5.5, 12, H100_ROOM),
        (7, 14, H100_ROOM),  # two threads share a node
    ],
)
def test_the_search_gives_the_references_symbols(
    bits: float, state_bits: int, room: int, tmp_path: Path
) -> None:
    code, random = TrellisCode(bits, state_bits), np.random.default_rng(3)
    targets = (random.standard_normal((3 if state_bits < 14 else 2, 256)) * 148).astype(np.float32)
    targets[0, :4] = [0, 1e6, -1e6, 1e-3]
    found = search_on_cpu(torch.from_numpy(targets), code, room, 36, tmp_path)
    assert np.array_equal(found.numpy(), half_reference.encode_tiles(targets, code, 36))


def test_a_gpu_with_little_shared_memory_refuses_what_does_not_fit_in_one_sentence() -> None:
    assert viterbi.layout(TrellisCode(1.5), A100_ROOM).constants["DOUBLE_BUFFER"] == 0
    assert viterbi.layout(TrellisCode(2.5), CONSUMER_ROOM).constants["DOUBLE_BUFFER"] == 1
    with pytest.raises(BackendUnavailableError, match=r"at 1\.5 bits needs 128 KB .* pass more bits"):
        viterbi.layout(TrellisCode(1.5), CONSUMER_ROOM)


@pytest.mark.parametrize(
    ("bits", "state_bits"), [(bits, 16) for bits in RATES] + [(1.5, 11), (3.5, 10), (5, 13), (7, 14)]
)
def test_every_lane_decodes_its_weights(bits: float, state_bits: int, tmp_path: Path) -> None:
    code, tiles = TrellisCode(bits, state_bits), 5
    constants = {"PAIR_BITS": code.pair_bits, "L": state_bits}
    source = '#include "half2.cuh"\n' + (KERNELS / "cuda/trellis.cuh").read_text("utf-8") + DECODE
    library = compiled(tmp_path, constants, source)
    random = np.random.default_rng(1)
    packed = random.integers(-(2**15), 2**15, (tiles, code.units_per_tile)).astype(np.int16)
    words = to_words(torch.from_numpy(packed))
    found = np.empty((tiles, 256), dtype=np.float16)
    library.decode(ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(found.ctypes.data), tiles)
    assert np.array_equal(found, tile_values(packed, code))
