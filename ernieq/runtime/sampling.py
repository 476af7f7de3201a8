"""From logits to tokens without leaving the GPU.

Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751). The draw is
that of the exponential race: the largest of p / e, with e exponential, is token i with probability p_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens that are drawn before the host looks at them, at most.
GROUP_LIMIT = 64


class DeviceSampler:
    """Draws a token for every sequence, in buffers of fixed addresses.

    Attributes:
        generator: the only source of randomness; a captured graph must know it.
        drawn: (T, GROUP_LIMIT) int64, tokens since ``begin_group``.
        finite: (1,) bool, whether all logits since ``begin`` were finite.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.generator = torch.Generator(device)
        self.drawn = torch.zeros(batch, GROUP_LIMIT, dtype=torch.int64, device=device)
        self.finite = torch.ones(1, dtype=torch.bool, device=device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._temperature = torch.ones(1, device=device)
        self._top_p = torch.ones(1, device=device)

    @property
    def state(self) -> list[Tensor]:
        """What a draw changes."""
        return [self.drawn, self.finite, self._slot]

    def begin(self, temperature: float, top_p: float, seed: int) -> None:
        """Set what ``draw`` goes by; a temperature of 0 has no meaning there."""
        self._temperature.fill_(max(temperature, torch.finfo(torch.float32).tiny))
        self._top_p.fill_(top_p)
        self.generator.manual_seed(seed)
        self.finite.fill_(True)

    def begin_group(self) -> None:
        """Let the next token be the first of ``drawn``."""
        self._slot.zero_()

    def draw(self, logits: Tensor, tokens: Tensor) -> None:
        """Draw from the fewest tokens whose probabilities reach top_p: (T, V) float32 -> ``tokens`` (T,)."""
        # Relative to the largest before the division, so that no temperature, however low, overflows.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        probabilities, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (T, V)
        sum_before = probabilities.cumsum(-1) - probabilities
        kept = probabilities * (sum_before < self._top_p)  # the most likely token is always kept
        waits = torch.empty_like(kept).exponential_(generator=self.generator)
        first = (kept / waits.clamp_(min=torch.finfo(torch.float32).tiny)).argmax(-1, keepdim=True)
        self._keep(logits, ids.gather(-1, first).squeeze(-1), tokens)

    def choose(self, logits: Tensor, tokens: Tensor) -> None:
        """Take the most likely token: (T, V) float32 -> ``tokens`` (T,) int64."""
        self._keep(logits, logits.argmax(-1), tokens)

    def _keep(self, logits: Tensor, chosen: Tensor, tokens: Tensor) -> None:
        self.finite.logical_and_(torch.isfinite(logits).all())
        tokens.copy_(chosen)
        self.drawn.scatter_(1, self._slot.expand(tokens.shape[0], 1), chosen[:, None])
        self._slot.add_(1).remainder_(GROUP_LIMIT)
