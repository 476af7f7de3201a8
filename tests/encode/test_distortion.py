"""The table of squared errors is what was measured, for every rate there is."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from ernieq.convert import KEEP
from ernieq.encode import SQUARED_ERROR
from ernieq.trellis import RATES

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "gaussian_rates.json"


def test_every_rate_has_the_error_that_was_measured() -> None:
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    full = {
        row["bits_per_weight"]: row["mse"]
        for row in rows
        if (row["state_bits"], row["first_pass_steps"]) == (16, 256)
    }
    assert sorted(SQUARED_ERROR) == [*RATES, KEEP]
    for rate in RATES:
        assert SQUARED_ERROR[rate] == pytest.approx(full[rate], rel=0.01)


def test_more_bits_err_less() -> None:
    errors = [SQUARED_ERROR[rate] for rate in sorted(SQUARED_ERROR)]
    assert all(more > less for more, less in pairwise(errors))
