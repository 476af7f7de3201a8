from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernieq import records


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (32_450_608, "32.5 MB"),
        (999_600, "1.00 MB"),
        (6_010_000_000, "6.01 GB"),
        (43_650_000_000_000, "43.6 TB"),
    ],
)
def test_bytes_are_written_in_decimal_units(count: int, text: str) -> None:
    assert records.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4249, "0.42 s"), (9.996, "10.0 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"), (7440, "2 h 04 min")],
)
def test_durations_grow_through_seconds_minutes_and_hours(seconds: float, text: str) -> None:
    assert records.format_seconds(seconds) == text


@given(st.floats(0, 1e6))
def test_no_duration_shows_sixty_seconds_or_minutes(seconds: float) -> None:
    assert not re.search(r"(?<![.\d])60(\.0)? (s|min)", records.format_seconds(seconds))


@pytest.mark.parametrize(
    ("count", "text"),
    [(9_999, "9,999"), (10_000, "10.0 k"), (16_200_000, "16.2 M"), (21_825_000_000, "21.8 B")],
)
def test_counts_are_exact_while_they_are_small(count: int, text: str) -> None:
    assert records.format_count(count) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(8.23, "8.2 weights/s"), (257_000, "257 k weights/s"), (4.3e6, "4.30 M weights/s")]
)
def test_rates_name_their_unit(rate: float, text: str) -> None:
    assert records.format_rate(rate, "weights") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.02174, "0.0217"), (89.97, "90.0"), (1234.5, "1,234"), (0.0, "0"), (0.00001234, "0.0000123")],
)
def test_significant_digits_never_turn_into_an_exponent(value: float, text: str) -> None:
    assert records.format_significant(value) == text


def test_bits_per_weight_count_all_bytes_and_no_weights_are_not_a_number() -> None:
    assert records.bits_per_weight(257, 1000) == pytest.approx(2.056)
    assert math.isnan(records.bits_per_weight(257, 0))
    assert records.format_bits(records.bits_per_weight(0, 0)) == "-"
    weights = records.WeightsRecord(1000, 600, 4000, 500, 2000)
    assert (weights.bits, weights.quantized_bits) == (2.0, 2.0)


def test_a_record_becomes_plain_values_all_the_way_down() -> None:
    interval = records.Interval(0.1, 0.2)
    divergence = records.DivergenceRecord(0.15, interval, 0.1, 1.0, 2.0, 0.7, 1.1, None)
    plain = records.to_plain(divergence)
    assert plain["kl_interval"] == {"low": 0.1, "high": 0.2}
    assert plain["ratio_interval"] is None


def test_records_and_reports_import_neither_torch_nor_numpy() -> None:
    code = "import sys, ernieq.records, ernieq.report; print({'torch', 'numpy'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
