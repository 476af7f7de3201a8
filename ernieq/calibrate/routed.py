"""Which tokens every expert was given, sorted once for a whole layer."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

CHUNK_TOKENS = 8192


class RoutedTokens:
    """Tokens by expert, and within an expert by segment of the sample.

    Args:
        selected: (N, k) int64, the experts of each token.
        weights: (N, k) float32, what their outputs are multiplied by.
        experts: their number.
        segment_tokens: tokens of a segment, the part of the sample that is looked at together.
    """

    def __init__(self, selected: Tensor, weights: Tensor, experts: int, segment_tokens: int) -> None:
        tokens, choices = selected.shape
        self._segments = [
            slice(start, min(start + segment_tokens, tokens)) for start in range(0, tokens, segment_tokens)
        ]
        count = len(self._segments)
        segment_of = torch.arange(tokens, device=selected.device) // segment_tokens
        place = (selected * count + segment_of[:, None]).flatten()  # (N k,), sorted by expert, then segment
        order = place.argsort(stable=True)
        chosen = order // choices
        self._tokens = chosen - segment_tokens * segment_of[chosen]
        self._weights = weights.flatten()[order]
        # The one wait for the device in a layer.
        counts = place.bincount(minlength=experts * count).tolist()
        self._ends: list[int] = [0, *accumulate(counts)]

    @property
    def segments(self) -> list[slice]:
        """Flat token ranges of the segments."""
        return self._segments

    def count(self, expert: int) -> int:
        """Tokens of an expert."""
        places = len(self._segments)
        return self._ends[(expert + 1) * places] - self._ends[expert * places]

    def chunks(self, expert: int, segment: int) -> list[tuple[Tensor, Tensor]]:
        """Tokens of an expert in a segment, counted from its beginning, and their weights, in chunks."""
        place = expert * len(self._segments) + segment
        start, stop = self._ends[place], self._ends[place + 1]
        tokens, weights = self._tokens[start:stop], self._weights[start:stop]
        return list(zip(tokens.split(CHUNK_TOKENS), weights.split(CHUNK_TOKENS), strict=True))
