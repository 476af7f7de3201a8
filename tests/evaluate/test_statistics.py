from __future__ import annotations

import math

import numpy as np
import pytest

from ernieq.evaluate.score import TokenScores
from ernieq.evaluate.statistics import bootstrap_interval, divergence_of, perplexity_of


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    record = perplexity_of(np.full((3, 5), math.log(10)), covered_bytes=15)
    assert record.perplexity == pytest.approx(10)
    assert record.token_error == pytest.approx(0, abs=1e-9)
    assert record.bits_per_byte == pytest.approx(math.log2(10))


def test_standard_errors_match_the_spread_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.normal(2, 1, (40, 25)) for _ in range(400)]
    spread = np.std([perplexity_of(nll, None).perplexity for nll in samples])
    record = perplexity_of(samples[0], None)
    assert record.window_error is not None
    assert record.token_error == pytest.approx(spread, rel=0.15)
    assert record.window_error == pytest.approx(spread, rel=0.35)


def test_the_window_error_exceeds_the_token_error_where_windows_differ() -> None:
    nll = np.repeat(np.arange(8.0)[:, None], 50, axis=1) / 4
    record = perplexity_of(nll, None)
    assert record.window_error is not None
    assert record.window_error > 5 * record.token_error


def test_a_single_window_has_no_window_error_and_no_interval() -> None:
    assert perplexity_of(np.ones((1, 5)), None).window_error is None
    assert bootstrap_interval(np.ones(1), seed=0) is None


def test_the_bootstrap_depends_on_its_seed_only() -> None:
    means = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(means, seed=3) == bootstrap_interval(means, seed=3)
    assert bootstrap_interval(means, seed=3) != bootstrap_interval(means, seed=4)


def test_the_bootstrap_interval_is_about_two_standard_errors_to_each_side() -> None:
    means = np.random.default_rng(1).normal(5, 1, size=400)
    interval = bootstrap_interval(means, seed=0)
    assert interval is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * means.std() / 20, rel=0.1)
    assert interval.low < means.mean() < interval.high


def test_the_ratio_interval_pairs_the_windows() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(4, 1, (20, 1)) + np.zeros((20, 30))  # windows differ much
    record = divergence_of(
        TokenScores(base + 0.1, base, np.zeros(base.shape), np.ones(base.shape, dtype=np.bool_)), seed=0
    )
    assert record.ratio_interval is not None
    assert record.ratio_interval.low == pytest.approx(math.exp(0.1))
    assert record.ratio_interval.high == pytest.approx(math.exp(0.1))


def test_quantiles_are_over_tokens_not_windows() -> None:
    kl = np.zeros((10, 100))
    kl[0] = np.arange(100)
    scores = TokenScores(kl, kl, kl, kl == 0)
    record = divergence_of(scores, seed=0)
    assert record.max_kl == 99
    assert record.median_kl == 0
    assert record.p99_kl == pytest.approx(np.percentile(kl, 99))
    assert record.mean_kl == pytest.approx(4.95)
    assert record.top1_agreement == pytest.approx(0.901)
