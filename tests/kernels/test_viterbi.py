"""The Viterbi search: against brute force and float64, and every compiled path against the reference."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from ernieq.encode.scales import CODEBOOK_SCALE
from ernieq.errors import BackendUnavailableError, NonFiniteError, ShapeError, UsageError
from ernieq.kernels import _native
from ernieq.kernels.backend import Backend, resolve_backend
from ernieq.kernels.viterbi import FULL_FIRST_PASS, SHORT_FIRST_PASS, encode_tiles, reference
from ernieq.trellis import (
    RATES,
    VALUE_RMS,
    TrellisCode,
    pack_symbols,
    ring_states,
    state_values,
    tile_values,
)

COMPILED = [Backend(name) for name in _native.available_isas()]


def gaussian(tiles: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((tiles, 256)) * VALUE_RMS).astype(np.float32)


def squared_error(symbols: NDArray[np.uint8], targets: NDArray[np.float32], code: TrellisCode) -> float:
    values = state_values(code.state_bits)[ring_states(symbols, code)]
    return float(np.square(values - targets.astype(np.float64)).mean() / VALUE_RMS**2)


def float_search(targets: NDArray[np.float64], code: TrellisCode, start: int) -> float:
    """Least cost of a path from a node back to it, by a plain float64 recursion over all branches."""
    values = state_values(code.state_bits).astype(np.float64)
    metrics = np.full(code.nodes_before(0), np.inf)
    metrics[start] = 0.0
    states = np.arange(code.states)
    for t, target in enumerate(targets):
        arriving = metrics[states >> code.shifts[t % 2]] + (values - target) ** 2
        metrics = arriving.reshape(code.symbols_at(t + 1), code.nodes_before(t + 1)).min(axis=0)
    return float(metrics[start])


def shortest(bits: float) -> TrellisCode:
    """The code of a rate with the shortest state that it may have."""
    return next(TrellisCode(bits, n) for n in (10, 12, 14, 16) if n >= 2 * math.ceil(bits))


@cache
def reference_choices(targets: bytes, code: TrellisCode, first_pass_steps: int) -> NDArray[np.uint8]:
    """The slow truth, computed once for all backends."""
    tiles = np.frombuffer(targets, np.float32).reshape(-1, 256)
    return encode_tiles(tiles, code, backend=Backend.REFERENCE, first_pass_steps=first_pass_steps)


@pytest.mark.parametrize("bits", RATES)
@pytest.mark.parametrize("backend", COMPILED)
def test_a_compiled_path_makes_the_reference_choices(backend: Backend, bits: float) -> None:
    code = shortest(bits)
    targets = gaussian(3, seed=round(2 * bits))
    targets[2, :40] *= 6  # far beyond the codebook: saturation must agree too
    for steps in (FULL_FIRST_PASS, 4):
        expected = reference_choices(targets.tobytes(), code, steps)
        found = encode_tiles(targets, code, backend=backend, first_pass_steps=steps)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [1.5, 2, 4, 4.5])
@pytest.mark.parametrize("backend", [backend for backend in COMPILED if backend is not Backend.SCALAR])
def test_compiled_paths_agree_at_full_state_length(backend: Backend, bits: float) -> None:
    code = TrellisCode(bits, 16)
    targets = gaussian(3)
    expected = encode_tiles(targets, code, backend=Backend.SCALAR)
    np.testing.assert_array_equal(encode_tiles(targets, code, backend=backend), expected)


def test_threads_and_the_number_of_tiles_do_not_change_a_choice() -> None:
    code = TrellisCode(2, 12)
    targets = gaussian(7)
    together = encode_tiles(targets, code, threads=2)
    alone = np.concatenate([encode_tiles(targets[i : i + 1], code, threads=1) for i in range(7)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 3.5, 4])
def test_the_search_equals_brute_force_on_a_short_sequence(bits: float) -> None:
    code = TrellisCode(bits, 10)
    steps = int(12 // bits)
    targets = np.rint(gaussian(1)[0, :steps] * 32).clip(-16383, 16383).astype(np.int16)
    start = 5 % code.nodes_before(0)
    metrics, choices = reference.search(targets, code, start)
    end = int(metrics.argmin())
    first, symbols = reference.trace_back(choices, end, code)
    costs = [reference.branch_costs(int(target), code) for target in targets]

    def path_cost(path: tuple[int, ...]) -> int:
        node, total = start, 0
        for step, symbol in enumerate(path):
            state = node << code.shifts[step % 2] | symbol
            total += int(costs[step][state])
            node = state % code.nodes_before(step + 1)
        return total

    best = min(map(path_cost, itertools.product(*(range(code.symbols_at(step)) for step in range(steps)))))
    assert first == start
    assert path_cost(tuple(symbols.tolist())) == int(metrics[end]) == best


@pytest.mark.parametrize("bits", RATES)
def test_integer_costs_lose_almost_nothing_against_a_float64_search(bits: float) -> None:
    code = shortest(bits)
    targets = gaussian(6).clip(-510, 510)  # beyond the codebook a target is clipped on purpose
    symbols = encode_tiles(targets, code)
    found = optimum = 0.0
    for tile, path in zip(targets.astype(np.float64), symbols, strict=True):
        states = ring_states(path, code)
        found += float(np.square(state_values(code.state_bits)[states] - tile).sum())
        optimum += float_search(tile, code, int(states[-1]) % code.nodes_before(0))
    assert optimum <= found + 1e-6
    assert found <= optimum * (1 + 5e-4)


@pytest.mark.parametrize("bits", [1.5, 2.5, 3, 3.5, 5.5])
def test_a_random_legal_path_is_found_again_with_zero_loss(bits: float) -> None:
    code = TrellisCode(bits, 12)
    packed = np.random.default_rng(3).integers(-(2**15), 2**15, (4, code.units_per_tile)).astype(np.int16)
    targets = tile_values(packed, code).astype(np.float32)
    symbols = encode_tiles(targets, code)
    np.testing.assert_array_equal(tile_values(pack_symbols(symbols, code), code), targets)


# Measured over a million samples (benchmarks/results/gaussian_rates.json): 0.1369, 0.0682, 0.0345, 0.01737,
# 0.00880, 0.00445; the margin covers the spread of 64 tiles.
@pytest.mark.parametrize(
    ("bits", "limit"), [(1.5, 0.1405), (2, 0.0700), (2.5, 0.0354), (3, 0.0180), (3.5, 0.00915), (4, 0.00465)]
)
def test_the_full_code_reaches_its_squared_error_on_a_gaussian_source(bits: float, limit: float) -> None:
    code = TrellisCode(bits, 16)
    factor = CODEBOOK_SCALE[bits]
    targets = gaussian(64) / np.float32(factor)
    assert squared_error(encode_tiles(targets, code), targets, code) * factor**2 < limit


def test_a_shortened_first_pass_is_slightly_worse() -> None:
    code = TrellisCode(2, 12)
    targets = gaussian(400)
    full = squared_error(encode_tiles(targets, code), targets, code)
    short = squared_error(encode_tiles(targets, code, first_pass_steps=SHORT_FIRST_PASS), targets, code)
    assert full < short < 1.03 * full


def test_bad_targets_are_refused() -> None:
    code = TrellisCode(2, 10)
    with pytest.raises(ShapeError, match=r"\(1, 255\)"):
        encode_tiles(np.zeros((1, 255), np.float32), code)
    with pytest.raises(NonFiniteError):
        encode_tiles(np.full((1, 256), np.nan, np.float32), code)
    for steps in (0, 2, 97, 98, 260):  # half of the pass lies before the seam and must start at an even weight
        with pytest.raises(UsageError, match=f"first_pass_steps is {steps}; it must be a multiple of 4"):
            encode_tiles(np.zeros((1, 256), np.float32), code, first_pass_steps=steps)


def test_a_backend_that_this_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available_isas", lambda: ["scalar"])
    assert resolve_backend(Backend.AUTO) is Backend.SCALAR
    with pytest.raises(BackendUnavailableError, match="avx512"):
        resolve_backend(Backend.AVX512)
