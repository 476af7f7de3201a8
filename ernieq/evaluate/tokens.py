"""Text to token ids, all at once, with the begin-of-text token first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.errors import TextError


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a whole text.

    Args:
        ids: (tokens,) int64; the begin-of-text token first, if the tokenizer has one.
        byte_counts: (tokens,) int64, bytes of the text that each token adds; they sum to the text's size. A
            token that continues a character adds none. None if the tokenizer gives no offsets.
        bos_token_id: the begin-of-text token, or None.
    """

    ids: NDArray[np.int64]
    byte_counts: NDArray[np.int64] | None
    bos_token_id: int | None


def tokenize_text(tokenizer: Any, text: str) -> TokenizedText:
    """Tokenise ``text`` once as a whole; the begin-of-text token comes first, if there is one.

    Args:
        tokenizer: from `ernieq.checkpoint.load_tokenizer`.
        text: the whole text.

    Raises:
        TextError: the text has no tokens.
    """
    offsets_known = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=offsets_known,
        verbose=False,
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if ids.size == 0:
        raise TextError(f"the text of {len(text)} characters has no tokens")
    byte_counts = _byte_counts(text, encoded["offset_mapping"]) if offsets_known else None
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        ids = np.concatenate(([bos], ids))
        byte_counts = None if byte_counts is None else np.concatenate(([0], byte_counts))
    return TokenizedText(ids, byte_counts, bos)


def _byte_counts(text: str, offsets: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Bytes that each token adds; characters that no token covers go to the next token.

    Tokens that share a character (a byte-level tokenizer may split one) all carry its full span, so the
    first of them gets the bytes and the others none.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate(([0], np.cumsum(widths)))  # (characters + 1,)
    ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(points)
    return np.diff(bytes_before[ends], prepend=0)
