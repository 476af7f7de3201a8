"""Types of the C++ module; arrays are C-contiguous and on the CPU, and are checked at every call."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def available_isas() -> list[str]: ...
def processor_features() -> dict[str, bool]: ...
def hadamard_rotate(
    input: NDArray[np.float32],
    signs: NDArray[np.int8],
    block: int,
    inverse: bool,
    output: NDArray[np.float32],
    threads: int,
) -> None: ...
def trellis_multiply(
    x: NDArray[np.float32],
    packed: NDArray[np.int16],
    scale: NDArray[np.float16],
    pair_bits: int,
    state_bits: int,
    out: NDArray[np.float32],
    isa: str,
    threads: int,
) -> None: ...
def trellis_decode(
    packed: NDArray[np.int16],
    scale: NDArray[np.float16],
    pair_bits: int,
    state_bits: int,
    first_row_tile: int,
    weights: NDArray[np.float32],
    isa: str,
    threads: int,
) -> None: ...
def viterbi_encode(**arguments: Any) -> None: ...
