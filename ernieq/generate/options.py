"""What can be asked of a completion."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernieq.errors import UsageError


@dataclass(frozen=True)
class GenerateOptions:
    """How a text is completed.

    Args:
        max_tokens: most tokens to add.
        temperature: what logits are divided by; 0 takes the most likely token always.
        top_p: tokens are drawn from the fewest whose probabilities reach this sum.
        seed: seed of the draws; the same seed gives the same text.
        stop: strings that end the text, and are not part of it.

    Raises:
        UsageError: a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is {self.temperature}; it must be 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed is {self.seed}; it must be 0 to 2^63 - 1")
        if not all(self.stop):
            raise UsageError("a stop string is empty; it would end every text at once")
