"""From tokens to text while they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what tokenizers decode the first bytes of a character to


class TextPieces:
    """Turns tokens into text that is complete: no half characters, no lost spaces.

    A tokenizer's text of a token can depend on its neighbours, so each piece is the difference between the text
    of a short run of tokens with the new one and without it.

    Args:
        tokenizer: with a ``decode`` as in transformers.
        prompt_ids: tokens before the first.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._run = list(prompt_ids[-4:])  # tokens whose text is known, then those whose text is not
        self._known = len(self._run)

    def add(self, token: int) -> str:
        """Text that a further token completes; empty while a character is unfinished."""
        self._run.append(token)
        text = self._pending()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._run, self._known = self._run[self._known :], len(self._run) - self._known
        return text

    def finish(self) -> str:
        """What is left: a character that was never finished, as the tokenizer shows it."""
        return self._pending() if len(self._run) > self._known else ""

    def _pending(self) -> str:
        before = self._decode(self._run[: self._known])
        return self._decode(self._run)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopWatch:
    """Cuts a text at the first stop string, even one that arrives in pieces.

    Args:
        stops: the strings; may be none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Text that can be shown: all but an end that may become a stop string."""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._release(min(places))
        return self._release(len(self._held) - self._open_end())

    def finish(self) -> str:
        """The end that was held back, if no stop string came of it."""
        return "" if self.stopped else self._release(len(self._held))

    def _open_end(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown
