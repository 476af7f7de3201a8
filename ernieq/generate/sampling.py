"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import NonFiniteError
from ernieq.generate.options import GenerateOptions


class Sampler:
    """Draws tokens; its randomness comes from the seed alone.

    Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751).
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._temperature = options.temperature
        self._top_p = options.top_p
        self._generator = torch.Generator().manual_seed(options.seed)

    def choose(self, logits: Tensor) -> int:
        """Choose a token: (vocabulary,) float32 -> its number.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        if not torch.isfinite(logits).all():
            raise NonFiniteError("the model's logits contain NaN or infinite numbers: its weights are damaged")
        if self._temperature == 0:
            return int(logits.argmax())
        # Relative to the largest before the division, so that no temperature, however low, overflows.
        scaled = (logits.double() - logits.max()) / self._temperature
        probabilities, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        sum_before = probabilities.cumsum(-1) - probabilities
        kept = probabilities * (sum_before < self._top_p)  # the most likely token is always kept
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])
