"""The two-pass search is held to the best closed path that there is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import FULL_FIRST_PASS, encode_tiles
from ernieq.trellis import VALUE_RMS, TrellisCode, ring_states, state_values
from tests.oracle.tail_biting import least_error

STATE_BITS = 10


@pytest.mark.parametrize("bits", [1.5, 2, 3.5, 4])
def test_the_search_comes_within_one_percent_of_the_best_closed_path_and_never_below_it(bits: float) -> None:
    code, values = TrellisCode(bits, STATE_BITS), state_values(STATE_BITS).astype(np.float32)
    tiles = (np.random.default_rng(round(2 * bits)).standard_normal((2, 256)) * VALUE_RMS).astype(np.float32)
    symbols = encode_tiles(tiles, code, first_pass_steps=FULL_FIRST_PASS, backend=Backend.AUTO, threads=1)
    chosen = values[ring_states(symbols, code)]
    for tile, path in zip(tiles, chosen, strict=True):
        best = least_error(tile, [int(bits), math.ceil(bits)] * 128, STATE_BITS, values)
        found = float(((tile - path) ** 2).sum())
        # Below by no more than rounding: of float32 sums here, of targets to whole units there.
        assert 0.999 * best < found < 1.01 * best
