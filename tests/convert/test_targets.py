"""Targets: sizes are read as they are written, and the smallest size that is named can be asked for."""

import pytest

from ernieq.convert import Goal, Target, parse_bytes
from ernieq.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6e9),
        ("13.7MB", 13.7e6),
        ("13.7 mb", 13.7e6),
        ("5800000", 5.8e6),
        ("512 B", 512),
        (".5kB", 500),
        ("1TB", 1e12),
    ],
)
def test_a_size_has_a_number_and_a_decimal_unit(text: str, size: float) -> None:
    assert parse_bytes(text, "--target-size") == pytest.approx(size)


@pytest.mark.parametrize(
    "text", ["", "GB", "6G", "six GB", "-6GB", "0", "0GB", "6GB8", "1e9", "nan", "inf", "6 G B", "9" * 400]
)
def test_what_is_no_size_is_refused_with_the_option_and_an_example(text: str) -> None:
    with pytest.raises(UsageError, match=r"--target-size is .* such as 6GB"):
        parse_bytes(text, "--target-size")


def test_binary_units_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="GiB"):
        parse_bytes("6GiB", "--target-size")


@pytest.mark.parametrize("size", [999, 31_789, 9_999_999, 12_345_678, 9_999_999_999, 43_650_000_001])
@pytest.mark.parametrize("goal", [Goal.FILE, Goal.DECODER, Goal.BITS_PER_PARAMETER])
def test_the_smallest_that_is_named_is_enough(goal: Goal, size: int) -> None:
    parameters = 3 * size
    named = Target(goal, 1).smallest(size, parameters)
    amount = float(named) if goal is Goal.BITS_PER_PARAMETER else parse_bytes(named, "")
    assert size <= Target(goal, amount).limit_bytes(parameters) <= 1.02 * size + 10


def test_bits_per_parameter_count_over_the_whole_file() -> None:
    assert Target(Goal.BITS_PER_PARAMETER, 2.25).limit_bytes(8000) == 2250
