"""Token ids to windows: which tokens are seen together, and which of them count.

``gptq``: non-overlapping windows, the tail dropped, every token of a window but its first is scored.

``llama.cpp``: as llama-perplexity does it. The first token of each window is replaced by the begin-of-text
token; the logits at positions ``window // 2`` to ``window - 2`` are scored against the token that follows
each, so that every scored token has at least half a window before it. 255 of 512 tokens count.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ernieq.errors import TextError, UsageError
from ernieq.evaluate.tokens import TokenizedText

MIN_WINDOW = 4


class Protocol(StrEnum):
    """How perplexity is measured; numbers of different protocols can't be compared."""

    GPTQ = "gptq"
    LLAMA_CPP = "llama.cpp"


@dataclass(frozen=True)
class Windows:
    """Windows of one text.

    Args:
        token_ids: (windows, window) int64.
        first_scored: the first position whose logits count; the last is ``window - 2``.
        covered_bytes: bytes of the text behind the scored tokens, or None if unknown.
        protocol: the rule that made them.
    """

    token_ids: Tensor
    first_scored: int
    covered_bytes: int | None
    protocol: Protocol

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.token_ids.shape[0]

    @property
    def window(self) -> int:
        """Tokens per window."""
        return self.token_ids.shape[1]

    @property
    def scored(self) -> int:
        """Tokens per window that count."""
        return self.window - 1 - self.first_scored


def make_windows(
    tokens: TokenizedText, protocol: Protocol, window: int, *, max_windows: int | None = None
) -> Windows:
    """Cut a tokenised text into windows.

    Args:
        tokens: the whole text.
        protocol: which tokens count.
        window: tokens per window.
        max_windows: keep at most so many, from the start.

    Raises:
        UsageError: ``window`` is below `MIN_WINDOW`, or ``max_windows`` below 1.
        TextError: the text is shorter than one window.
    """
    if window < MIN_WINDOW:
        raise UsageError(f"window is {window} tokens; at least {MIN_WINDOW} are needed")
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"the number of windows is {max_windows}; at least 1 is needed")
    count = len(tokens.ids) // window
    if count == 0:
        raise TextError(f"the text has {len(tokens.ids)} tokens; one window of {window} is needed")
    count = count if max_windows is None else min(count, max_windows)
    token_ids = torch.from_numpy(tokens.ids[: count * window].copy()).reshape(count, window)
    first_scored = 0
    if protocol is Protocol.LLAMA_CPP:
        first_scored = window // 2
        if tokens.bos_token_id is not None:
            token_ids[:, 0] = tokens.bos_token_id
    covered = None
    if tokens.byte_counts is not None:
        per_window = tokens.byte_counts[: count * window].reshape(count, window)
        covered = int(per_window[:, first_scored + 1 :].sum())
    return Windows(token_ids, first_scored, covered, protocol)
