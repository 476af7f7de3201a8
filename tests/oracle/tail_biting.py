"""The best closed path of a tile: one full Viterbi search from every start state, all side by side.

Source: QTIP (arXiv 2406.11235), the bitshift trellis: a state is a run of bits, a step shifts in the bits of
one symbol. The path must end in the state that it began in. Nothing of the package's search is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def least_error(
    targets: NDArray[np.float32], shifts: Sequence[int], state_bits: int, values: NDArray[np.float32]
) -> float:
    """The least squared error that any closed path has.

    Args:
        targets: (steps,) wanted values.
        shifts: bits of the symbol of every weight.
        state_bits: of a state; the work grows with four to this power.
        values: (2 ** state_bits,) value of every state.
    """
    states = 1 << state_bits
    costs = np.full((states, states), np.inf, dtype=np.float32)  # [start, state]
    np.fill_diagonal(costs, 0)
    for wanted, shift in zip(targets, shifts, strict=True):
        symbols = 1 << shift
        # State s * symbols + symbol is reached from s, s + states / symbols, s + 2 * states / symbols, ...
        cheapest = costs.reshape(states, symbols, states // symbols).min(axis=1)
        costs = np.repeat(cheapest, symbols, axis=1) + (np.float32(wanted) - values) ** 2
    return float(np.diagonal(costs).min())
