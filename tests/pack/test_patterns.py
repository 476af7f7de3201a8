"""Sets of integers in names: compact and exact."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernieq.errors import FormatError
from ernieq.pack.patterns import compact_names, expand_names

names = st.builds(
    lambda layer, expert, projection: f"model.layers.{layer}.experts.{expert}.{projection}",
    st.integers(0, 12),
    st.integers(0, 9),
    st.sampled_from(["gate", "up"]),
)


@given(st.sets(names | st.sampled_from(["model.norm", "a", "b.3x", "0", "7.01"])))
def test_compact_names_expand_to_the_same_names(given_names: set[str]) -> None:
    plain = {name for name in given_names if name != "7.01"}
    assert sorted(expand_names(compact_names(plain), "test")) == sorted(plain)


def test_all_experts_of_a_model_take_one_line_per_projection() -> None:
    experts = [f"layers.{layer}.experts.{expert}.up" for layer in range(1, 28) for expert in range(64)]
    assert compact_names(experts) == ["layers.1-27.experts.0-63.up"]


def test_an_index_set_lists_its_gaps() -> None:
    assert compact_names(f"e.{i}" for i in (0, 1, 2, 5, 7, 8)) == ["e.0-2,5,7-8"]


@pytest.mark.parametrize("name", ["a.1-2.b", "a.01", "a.1,2"])
def test_a_name_that_reads_like_a_set_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="range of numbers"):
        compact_names([name])


@pytest.mark.parametrize(
    "pattern", ["a.3-1", "a.00-01", "a.0-9999999", "a.0-999.0-999", "0-9.0-9.0-9.0-9.0-9.0-9"]
)
def test_an_illegal_or_huge_set_is_refused_before_it_is_expanded(pattern: str) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError):
        expand_names([pattern], "test")
    assert time.monotonic() - started < 0.5


def test_a_name_listed_twice_is_refused() -> None:
    with pytest.raises(FormatError, match=r"lists a\.2 twice"):
        expand_names(["a.1-2", "a.2-3"], "test")
