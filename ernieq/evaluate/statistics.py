"""Numbers per token to means, standard errors and intervals.

All windows have the same number of scored tokens, so the mean of window means is the mean over tokens.
Tokens of one window depend on each other; windows are taken as independent. Intervals are therefore made
by drawing windows, not tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ernieq.evaluate.score import TokenScores
from ernieq.records import DivergenceRecord, Interval, PerplexityRecord

Array = NDArray[np.float64]

BOOTSTRAP_DRAWS = 2000
_PERCENTILES = (2.5, 97.5)


def perplexity_of(nll: Array, covered_bytes: int | None) -> PerplexityRecord:
    """Perplexity with standard errors by the delta method: d exp(m) = exp(m) dm.

    Args:
        nll: (windows, scored) nats.
        covered_bytes: bytes of the text behind the scored tokens.
    """
    mean = float(nll.mean())
    perplexity = math.exp(mean)
    per_token = float(nll.std(ddof=1)) / math.sqrt(nll.size) if nll.size > 1 else math.inf
    window_error = None
    if len(nll) > 1:
        window_error = perplexity * float(nll.mean(axis=1).std(ddof=1)) / math.sqrt(len(nll))
    bits_per_byte = float(nll.sum()) / math.log(2) / covered_bytes if covered_bytes else None
    return PerplexityRecord(mean, perplexity, perplexity * per_token, window_error, bits_per_byte)


def bootstrap_interval(window_means: Array, seed: int) -> Interval | None:
    """95% percentile interval of the mean, from windows drawn with replacement.

    Args:
        window_means: (windows,) one value a window.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        The interval, or None with a single window, from which no spread can be learnt.
    """
    count = len(window_means)
    if count < 2:
        return None
    draws = np.random.default_rng(seed).integers(count, size=(BOOTSTRAP_DRAWS, count))
    low, high = np.percentile(window_means[draws].mean(axis=1), _PERCENTILES)
    return Interval(float(low), float(high))


def divergence_of(scores: TokenScores, seed: int) -> DivergenceRecord:
    """Summarise the divergence from the base; ``scores`` must have been made with a base."""
    assert scores.base_nll is not None
    assert scores.kl is not None
    assert scores.same_top1 is not None
    gap = (scores.nll - scores.base_nll).mean(axis=1)  # (windows,), paired
    gap_interval = bootstrap_interval(gap, seed)
    ratio_interval = gap_interval and Interval(math.exp(gap_interval.low), math.exp(gap_interval.high))
    return DivergenceRecord(
        mean_kl=float(scores.kl.mean()),
        kl_interval=bootstrap_interval(scores.kl.mean(axis=1), seed),
        median_kl=float(np.median(scores.kl)),
        p99_kl=float(np.percentile(scores.kl, 99)),
        max_kl=float(scores.kl.max()),
        top1_agreement=float(scores.same_top1.mean()),
        perplexity_ratio=math.exp(float(gap.mean())),
        ratio_interval=ratio_interval,
    )
