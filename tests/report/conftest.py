"""Results to be reported."""

from __future__ import annotations

import pytest

from ernieq.records import (
    DivergenceRecord,
    EvaluationRecord,
    Interval,
    PerplexityRecord,
    RoutingRecord,
    TextRecord,
    WeightsRecord,
)


@pytest.fixture
def record() -> EvaluationRecord:
    return EvaluationRecord(
        text=TextRecord("wikitext2", "ab12", 400_000, 120_000, "gptq", 1024, 48, 49_104, True),
        perplexity=PerplexityRecord(4.5138, 91.23, 0.91, 1.82, 1.77),
        base=PerplexityRecord(4.4995, 89.97, 0.9, 1.8, 1.76),
        divergence=DivergenceRecord(
            0.136, Interval(0.131, 0.141), 0.05, 1.21, 7.6, 0.778, 1.014, Interval(1.01, 1.02)
        ),
        routing=(RoutingRecord(1, 0.95, 0.01), RoutingRecord(2, 0.93, 0.02)),
        seconds=12.0,
    )


@pytest.fixture
def weights() -> WeightsRecord:
    return WeightsRecord(36_800_000, 13_700_000, 50_900_000, 11_000_000, 42_000_000)


@pytest.fixture
def base_weights() -> WeightsRecord:
    return WeightsRecord(101_900_000, 85_100_000, 50_900_000, 0, 0)
