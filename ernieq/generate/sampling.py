"""From logits to a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.errors import NonFiniteError
from ernieq.generate.options import GenerateOptions

_DAMAGED = -1  # what `draw` gives for logits that are not finite


class Sampler:
    """Draws tokens; its randomness comes from the seed alone.

    On a GPU the draw is made there, by a generator of its own: the distribution is the same, the tokens of a
    seed are others.

    Source of top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751).
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._temperature = options.temperature
        self._top_p = options.top_p
        self._seed = options.seed
        self._generator: torch.Generator | None = None

    def choose(self, logits: Tensor) -> int:
        """Choose a token: (vocabulary,) float32 -> its number.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        if logits.is_cuda:
            return self.read(self.draw(logits))
        if not torch.isfinite(logits).all():
            raise damaged()
        if self._temperature == 0:
            return int(logits.argmax())
        kept, tokens = self._kept(logits)
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator_on(logits.device))])

    def draw(self, logits: Tensor) -> Tensor:
        """Choose a token without waiting for the GPU: (vocabulary,) float32 -> (1,) int64, for ``read``."""
        finite = torch.isfinite(logits).all()
        logits = logits.nan_to_num(0.0, 0.0, 0.0)  # or the GPU would stop with an error of its own
        if self._temperature == 0:
            token = logits.argmax()
        else:
            kept, tokens = self._kept(logits)
            # The first of exponential clocks to ring, each as fast as its token is likely.
            clocks = torch.empty_like(kept).exponential_(generator=self._generator_on(logits.device))
            token = tokens[(kept / clocks).argmax(keepdim=True)]
        return torch.where(finite, token, _DAMAGED).view(1)

    @staticmethod
    def read(token: Tensor) -> int:
        """The number of a token that ``draw`` chose.

        Raises:
            NonFiniteError: a logit was NaN or infinite.
        """
        number = int(token)
        if number == _DAMAGED:
            raise damaged()
        return number

    def _kept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the tokens that top-p keeps, falling, zero for the others; and the tokens."""
        # Relative to the largest before the division, so that no temperature, however low, overflows.
        scaled = (logits.double() - logits.max()) / self._temperature
        probabilities, tokens = scaled.softmax(-1).sort(descending=True, stable=True)
        sum_before = probabilities.cumsum(-1) - probabilities
        return probabilities * (sum_before < self._top_p), tokens  # the most likely token is always kept

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


def damaged() -> NonFiniteError:
    """The error of logits that are not finite."""
    return NonFiniteError("the model's logits contain NaN or infinite numbers: its weights are damaged")
