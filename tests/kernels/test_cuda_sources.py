"""The GPU's sources compile for every generation that is supported, where a CUDA compiler is at hand."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import ernieq.kernels

KERNELS = Path(ernieq.kernels.__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc) on the path")


def search(even: int, odd: int, double_buffer: int) -> tuple[str, dict[str, int]]:
    """The search at 16 state bits with these shifts."""
    constants = {"SHIFT_EVEN": even, "SHIFT_ODD": odd, "L": 16, "VALUES": 64, "DOUBLE_BUFFER": double_buffer}
    return "viterbi/viterbi.cu", constants


SOURCES = [
    search(2, 2, 0),
    search(1, 2, 1),
    search(2, 3, 0),
    search(8, 8, 1),
    ("trellis_matmul/multiply_few.cu", {"PAIR_BITS": 10, "L": 16, "WARPS": 8}),
    ("trellis_matmul/multiply_few.cu", {"PAIR_BITS": 3, "L": 16, "WARPS": 8}),
    ("trellis_matmul/multiply_many.cu", {"PAIR_BITS": 4, "L": 12, "WARPS": 8, "TOKEN_TILES": 16}),
    ("trellis_matmul/multiply_many.cu", {"PAIR_BITS": 7, "L": 16, "WARPS": 8, "TOKEN_TILES": 16}),
    ("trellis_matmul/decode.cu", {"PAIR_BITS": 16, "L": 16, "WARPS": 4}),
    ("token_step/token_step.cu", {"BLOCK": 16, "EXPERTS": 16}),
    ("token_step/attention.cu", {"HEAD_DIM": 128, "GROUP": 5}),
]


def test_every_source_is_listed_here() -> None:
    assert {path.relative_to(KERNELS).as_posix() for path in KERNELS.rglob("*.cu")} == {
        name for name, _ in SOURCES
    }


@needs_compiler
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "constants"), SOURCES, ids=str)
def test_source_compiles_without_warnings_and_spills(
    name: str, constants: dict[str, int], architecture: str, tmp_path: Path
) -> None:
    text = re.sub(
        r'^#include "(\w+\.cuh)"$',
        lambda match: (KERNELS / "cuda" / match[1]).read_text(encoding="utf-8"),
        (KERNELS / name).read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    defines = "".join(f"#define {key} {value}\n" for key, value in constants.items())
    source = tmp_path / "kernel.cu"
    source.write_text(defines + text, encoding="utf-8")
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o", "kernel.cubin"]
    done = subprocess.run([*command, source.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert max(spills) <= 64, done.stderr
