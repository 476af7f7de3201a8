"""Hidden states to numbers per token; full logits exist only for a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernieq.errors import NonFiniteError
from ernieq.evaluate.stream import LayerStream, OnProgress

Array = NDArray[np.float64]

# Tables of (tokens, vocabulary) that are alive at once: one for a single model (its logits turn into log
# probabilities: two), three with a base (both models' log probabilities and their difference).
_TABLES = 3
_FLOAT_BYTES = 4

# Larger chunks are no faster: 256 rows keep a matrix product busy, and tables beyond some tens of MB are
# mapped anew by the allocator for each chunk (measured: two thirds of the time of chunks of 1300 rows).
_MAX_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class TokenScores:
    """Numbers of every scored token, (windows, scored); those of the base only with a base.

    Args:
        nll: float64, nats.
        base_nll: float64, nats, by the base.
        kl: float64, KL(base || measured), nats.
        same_top1: bool, whether both models prefer the same token.
    """

    nll: Array
    base_nll: Array | None = None
    kl: Array | None = None
    same_top1: NDArray[np.bool_] | None = None


def join_scores(parts: list[TokenScores]) -> TokenScores:
    """Put the windows of several groups behind each other."""
    nll = np.concatenate([part.nll for part in parts])
    base_nll = [part.base_nll for part in parts if part.base_nll is not None]
    kl = [part.kl for part in parts if part.kl is not None]
    same_top1 = [part.same_top1 for part in parts if part.same_top1 is not None]
    if not kl:
        return TokenScores(nll)
    return TokenScores(nll, np.concatenate(base_nll), np.concatenate(kl), np.concatenate(same_top1))


def chunk_tokens(vocab_size: int, logits_bytes: int) -> int:
    """Tokens per chunk so that all logits alive at once stay within ``logits_bytes``; at least one."""
    return max(1, min(_MAX_CHUNK_TOKENS, logits_bytes // (_TABLES * _FLOAT_BYTES * vocab_size)))


def score_states(
    stream: LayerStream,
    hidden: Tensor,
    token_ids: Tensor,
    first_scored: int,
    *,
    base: tuple[LayerStream, Tensor] | None = None,
    logits_bytes: int,
    on_progress: OnProgress | None = None,
) -> TokenScores:
    """Compare logits with the tokens that follow, and with the base's logits.

    Args:
        stream: the measured model.
        hidden: (windows, window, hidden) float32, its states before the final norm, where the stream computes.
        token_ids: (windows, window) int64.
        first_scored: the first position whose logits count; the last is ``window - 2``.
        base: the base model, on the same device, and its states, if any.
        logits_bytes: bound on all (tokens, vocabulary) tables alive at once.
        on_progress: called with "logits", tokens done and tokens in all.

    Raises:
        NonFiniteError: logits are NaN or infinite.
    """
    count, window = token_ids.shape
    scored = torch.arange(first_scored, window - 1)
    positions = (torch.arange(count)[:, None] * window + scored).reshape(-1)  # into (windows * window)
    targets = token_ids.reshape(-1)[positions + 1]
    columns = {name: np.empty(len(positions)) for name in ("nll", "base_nll", "kl", "same_top1")}
    size = chunk_tokens(stream.config.vocab_size, logits_bytes)
    with torch.inference_mode():
        for rows in _chunks(len(positions), size):
            log_probs = _log_probs(stream, hidden, positions[rows])
            columns["nll"][rows] = _losses(log_probs, targets[rows], "the measured model")
            if base is not None:
                base_log_probs = _log_probs(*base, positions[rows])
                columns["base_nll"][rows] = _losses(base_log_probs, targets[rows], "the base model")
                columns["same_top1"][rows] = (log_probs.argmax(1) == base_log_probs.argmax(1)).cpu().numpy()
                columns["kl"][rows] = _divergence_in_place(base_log_probs, log_probs)
            if on_progress is not None:
                on_progress("logits", rows.stop, len(positions))
    tables = {name: column.reshape(count, len(scored)) for name, column in columns.items()}
    if base is None:
        return TokenScores(tables["nll"])
    return TokenScores(tables["nll"], tables["base_nll"], tables["kl"], tables["same_top1"].astype(np.bool_))


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _log_probs(stream: LayerStream, hidden: Tensor, positions: Tensor) -> Tensor:
    states = hidden.reshape(-1, hidden.shape[-1])[positions.to(hidden.device)]  # (tokens, hidden)
    return torch.log_softmax(stream.head(states).float(), dim=1)  # (tokens, vocabulary)


def _losses(log_probs: Tensor, targets: Tensor, who: str) -> Array:
    """Minus the log probability of the tokens that follow; NaN or infinite logits spoil their whole row."""
    chosen = targets[:, None].to(log_probs.device)
    losses: Array = -log_probs.gather(1, chosen)[:, 0].double().cpu().numpy()
    if not np.isfinite(losses).all():
        raise NonFiniteError(f"logits of {who} are NaN or infinite; all of them must be finite")
    return losses


def _divergence_in_place(base_log_probs: Tensor, log_probs: Tensor) -> Array:
    """KL(base || measured) per row, nats; overwrites both tables to save memory."""
    difference = log_probs.neg_().add_(base_log_probs)
    divergence: Tensor = torch.linalg.vecdot(base_log_probs.exp_(), difference)
    return divergence.double().cpu().numpy()
