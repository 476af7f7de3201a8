"""Properties of the tile order, the ring and the values."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernieq.errors import ShapeError, UsageError
from ernieq.trellis import (
    RATES,
    TILE_WEIGHTS,
    EncodedMatrix,
    TrellisCode,
    matrix_to_tiles,
    pack_symbols,
    ring_states,
    state_values,
    tile_order,
    tile_values,
    tiles_to_matrix,
    unpack_symbols,
)

CODES = st.sampled_from(
    [
        TrellisCode(bits, state_bits)
        for bits in RATES
        for state_bits in (10, 12, 14, 16)
        if state_bits >= 2 * math.ceil(bits)
    ]
)


def slow_value(state: int) -> int:
    """The value of a state in plain Python integers, from the formula in DESIGN and FORMAT.md."""
    product = (0x83DCD12D * state) % 2**32
    return sum(product.to_bytes(4, "little")) - 510


def slow_states(symbols: list[int], bits: float, state_bits: int) -> list[int]:
    """States from the definition: the L bits of the ring that end with the symbol's own bits."""
    own = [math.floor(bits), math.ceil(bits)]
    ring = "".join(format(symbol, f"0{own[t % 2]}b") for t, symbol in enumerate(symbols))
    doubled = ring + ring
    ends = list(itertools.accumulate(own[t % 2] for t in range(len(symbols))))
    return [int(doubled[len(ring) + end - state_bits : len(ring) + end], 2) for end in ends]


def test_values_equal_the_byte_sum_in_plain_integers() -> None:
    values = state_values(16)
    for state in [0, 1, 2, 255, 256, 4095, 40000, 65535]:
        assert values[state] == slow_value(state)


def test_values_are_about_gaussian_with_the_stated_spread() -> None:
    values = state_values(16).astype(np.float64)
    assert abs(values.mean()) < 0.05
    assert values.std() == pytest.approx(147.8, abs=0.05)
    assert (values**4).mean() / values.var() ** 2 == pytest.approx(2.7, abs=0.05)


@given(CODES, st.data())
@settings(max_examples=60, deadline=None)
def test_any_byte_string_is_a_legal_tile_and_packs_back_to_itself(
    code: TrellisCode, data: st.DataObject
) -> None:
    raw = data.draw(st.binary(min_size=2 * code.units_per_tile, max_size=2 * code.units_per_tile))
    packed = np.frombuffer(raw, dtype="<i2")
    symbols = unpack_symbols(packed, code)
    assert symbols.shape == (TILE_WEIGHTS,)
    assert all(symbols[parity::2].max() < code.symbols_at(parity) for parity in (0, 1))
    np.testing.assert_array_equal(pack_symbols(symbols, code), packed)
    expected = slow_states(symbols.tolist(), code.bits_per_weight, code.state_bits)
    assert ring_states(symbols, code).tolist() == expected
    assert np.abs(tile_values(packed, code)).max() <= 510


@pytest.mark.parametrize("bits", [1.5, 3, 3.5, 8])
def test_each_state_overlaps_the_next_in_all_but_its_new_bits_around_the_ring(bits: float) -> None:
    code = TrellisCode(bits)
    shifts = np.tile(code.shifts, TILE_WEIGHTS // 2)
    symbols = np.random.default_rng(0).integers(0, 1 << shifts).astype(np.uint8)
    states = ring_states(symbols, code).astype(np.int64)
    np.testing.assert_array_equal((np.roll(states, 1) << shifts & 0xFFFF) | symbols, states)


def test_the_two_shifts_of_a_pair_add_up_to_its_bits_and_differ_by_at_most_one() -> None:
    for bits in RATES:
        code = TrellisCode(bits)
        even, odd = code.shifts
        assert even + odd == code.pair_bits == 2 * bits
        assert 0 <= odd - even <= 1
        assert (code.nodes_before(0), code.nodes_before(7)) == (1 << 16 - even, 1 << 16 - odd)
        assert 16 * code.units_per_tile == TILE_WEIGHTS * bits


def test_a_whole_rate_is_the_same_code_however_it_is_written() -> None:
    assert TrellisCode(2.0) == TrellisCode(2)
    assert hash(TrellisCode(2.0)) == hash(TrellisCode(2))
    assert repr(TrellisCode(2.0)) == "TrellisCode(bits_per_weight=2, state_bits=16)"
    assert TrellisCode(2.5).bits_per_weight == 2.5


def test_the_tile_order_is_the_operand_order_of_m16n8k16() -> None:
    order = tile_order()
    assert sorted(order.tolist()) == list(range(256))
    # PTX ISA, "Matrix fragments for mma.m16n8k16": a0..a7 of lane 5, rows 1 and 9, columns 2, 3, 10, 11.
    rows_columns = [(1, 2), (1, 3), (9, 2), (9, 3), (1, 10), (1, 11), (9, 10), (9, 11)]
    assert order[40:48].tolist() == [row * 16 + column for row, column in rows_columns]


@given(st.integers(1, 4), st.integers(1, 4))
def test_cutting_into_tiles_is_undone_by_joining_them(rows: int, columns: int) -> None:
    matrix = np.arange(rows * columns * 256).reshape(rows * 16, columns * 16)
    np.testing.assert_array_equal(tiles_to_matrix(matrix_to_tiles(matrix)), matrix)


def test_a_side_that_is_no_multiple_of_16_is_refused() -> None:
    with pytest.raises(ShapeError, match="24 x 16"):
        matrix_to_tiles(np.zeros((24, 16)))


@pytest.mark.parametrize("bits", [1, 2.25, 6.5, 7.5, 9, -2, math.nan, math.inf, True, "2"])
def test_a_rate_that_the_code_does_not_have_is_refused(bits: Any) -> None:
    with pytest.raises(UsageError, match=r"takes 1\.5 to 6 in halves, 7 or 8"):
        TrellisCode(bits)


@pytest.mark.parametrize(
    ("bits", "state_bits"), [(2, 9), (2, 15), (6, 11), (2, 18), (5.5, 11), (7, 13), (8, 14)]
)
def test_a_state_of_another_length_or_below_two_symbols_is_refused(bits: float, state_bits: int) -> None:
    with pytest.raises(UsageError, match=r"state bits"):
        TrellisCode(bits, state_bits)


def test_an_encoded_matrix_decodes_exactly_to_scale_times_value_over_128() -> None:
    rng = np.random.default_rng(1)
    code = TrellisCode(2)
    packed = rng.integers(-(2**15), 2**15, (2, 3, 32)).astype(np.int16)
    scale = rng.uniform(0.01, 0.05, 32).astype(np.float16)
    matrix = EncodedMatrix(packed, scale, np.ones(48, np.int8), 16, code)
    values = tiles_to_matrix(tile_values(packed, code)).astype(np.float64)
    exact = values * scale.astype(np.float64)[:, None] / 128
    np.testing.assert_array_equal(matrix.rotated_weight().astype(np.float64), exact)


def test_an_encoded_matrix_whose_parts_do_not_fit_is_refused() -> None:
    packed = np.zeros((1, 1, 32), np.int16)
    scale, signs = np.ones(16, np.float16), np.ones(16, np.int8)
    with pytest.raises(ShapeError, match="units"):
        EncodedMatrix(packed, scale, signs, 16, TrellisCode(3))
    with pytest.raises(ShapeError, match="scale"):
        EncodedMatrix(packed, scale[:8], signs, 16, TrellisCode(2))
    with pytest.raises(ShapeError, match="signs"):
        EncodedMatrix(packed, scale, signs[:8], 16, TrellisCode(2))
    with pytest.raises(ShapeError, match="rotation block"):
        EncodedMatrix(packed, scale, signs, 12, TrellisCode(2))
