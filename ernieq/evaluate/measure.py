"""The whole measurement: a stream of layers and a text in, a record out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ernieq.errors import UsageError
from ernieq.evaluate.routing import RoutingTally
from ernieq.evaluate.score import TokenScores, join_scores, score_states
from ernieq.evaluate.statistics import divergence_of, perplexity_of
from ernieq.evaluate.stream import LayerStream, OnProgress, RoutingTrace, final_states
from ernieq.evaluate.text import EvaluationText
from ernieq.evaluate.tokens import tokenize_text
from ernieq.evaluate.windows import Protocol, Windows, make_windows
from ernieq.records import EvaluationRecord, RoutingRecord, TextRecord

DEFAULT_BATCH = 4
LOGITS_BYTES = 256_000_000
STATE_BYTES = 4_000_000_000
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Budget:
    """How much is held at once, in the memory of the stream's device; the results do not depend on it.

    Args:
        batch: windows per step.
        logits_bytes: bound on all logits alive at once.
        state_bytes: bound on the hidden states of all windows, both models together; with more, the windows
            are measured in groups, and the layers are read again for each group.
    """

    batch: int = DEFAULT_BATCH
    logits_bytes: int = LOGITS_BYTES
    state_bytes: int = STATE_BYTES

    @classmethod
    def on(cls, device: torch.device, batch: int = DEFAULT_BATCH) -> Self:
        """The default bounds, or those of a GPU whose free memory is small: a quarter of it for states."""
        if device.type != "cuda":
            return cls(batch)
        free, _total = torch.cuda.mem_get_info(device)
        return cls(batch, state_bytes=min(STATE_BYTES, free // 4), logits_bytes=min(LOGITS_BYTES, free // 4))

    def windows_per_group(self, window: int, hidden_size: int, models: int) -> int:
        """Windows whose hidden states fit into ``state_bytes``; at least one."""
        return max(1, self.state_bytes // (models * window * hidden_size * _FLOAT_BYTES))


@dataclass(frozen=True)
class StreamScores:
    """Scores per token, and routing fidelity per MoE layer (empty without a base)."""

    tokens: TokenScores
    routing: tuple[RoutingRecord, ...]


def evaluate_stream(
    stream: LayerStream,
    windows: Windows,
    base_stream: LayerStream | None = None,
    *,
    budget: Budget | None = None,
    on_progress: OnProgress | None = None,
) -> StreamScores:
    """Measure a model on windows, one layer in memory at a time.

    Args:
        stream: the model.
        windows: the tokens, and which of them count.
        base_stream: the model that it is compared with, if any.
        budget: memory bounds.
        on_progress: called with what is under way, steps done and steps in all.

    Raises:
        UsageError: the windows are longer than the model's positions, or the base has another vocabulary.
        NonFiniteError: logits are NaN or infinite.
    """
    budget = budget or Budget()
    _check(stream, windows, base_stream)
    models = 1 if base_stream is None else 2
    tally = RoutingTally(stream.config.moe_num_experts)
    size = budget.windows_per_group(windows.window, stream.config.hidden_size, models)
    parts = [
        _score_group(stream, token_ids, windows.first_scored, base_stream, budget, tally, on_progress)
        for token_ids in torch.split(windows.token_ids, size)
    ]
    return StreamScores(join_scores(parts), tally.records())


def _score_group(
    stream: LayerStream,
    token_ids: Tensor,
    first_scored: int,
    base_stream: LayerStream | None,
    budget: Budget,
    tally: RoutingTally,
    on_progress: OnProgress | None,
) -> TokenScores:
    """Both models through all layers on one group of windows, then their logits chunk by chunk."""
    if base_stream is None:
        hidden, base = final_states(stream, token_ids, batch=budget.batch, on_progress=on_progress), None
    else:
        trace, base_trace = RoutingTrace(), RoutingTrace()
        hidden = final_states(stream, token_ids, batch=budget.batch, trace=trace, on_progress=on_progress)
        base_hidden = final_states(
            base_stream,
            token_ids,
            batch=budget.batch,
            trace=base_trace,
            label="base layers",
            on_progress=on_progress,
        )
        tally.add(trace, base_trace)
        base = (base_stream, base_hidden)
    return score_states(
        stream,
        hidden,
        token_ids,
        first_scored,
        base=base,
        logits_bytes=budget.logits_bytes,
        on_progress=on_progress,
    )


def evaluate_text(
    stream: LayerStream,
    text: EvaluationText,
    tokenizer: Any,
    *,
    protocol: Protocol = Protocol.GPTQ,
    window: int,
    max_windows: int | None = None,
    base_stream: LayerStream | None = None,
    noise_stream: LayerStream | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> EvaluationRecord:
    """Measure a model on a text.

    Args:
        stream: the model.
        text: the text.
        tokenizer: of the model, from `ernieq.checkpoint.load_tokenizer`.
        protocol: which tokens count.
        window: tokens per window.
        max_windows: keep at most so many, from the start.
        base_stream: the model that it is compared with, if any.
        noise_stream: the base once more, in the arithmetic it is commonly run in; its divergence from
            ``base_stream`` is the floor below which no divergence means anything.
        budget: memory bounds.
        seed: of the bootstrap.
        on_progress: called with what is under way, steps done and steps in all.

    Raises:
        TextError: the text is shorter than one window.
        UsageError: as `evaluate_stream` and `make_windows`; or a noise floor is wanted without a base.
        NonFiniteError: logits are NaN or infinite.
    """
    start = time.perf_counter()
    tokens = tokenize_text(tokenizer, text.text)
    windows = make_windows(tokens, protocol, window, max_windows=max_windows)
    result = evaluate_stream(stream, windows, base_stream, budget=budget, on_progress=on_progress)
    scores = result.tokens
    noise = None
    if noise_stream is not None:
        if base_stream is None:
            raise UsageError("a noise floor is a divergence from the base, and there is no base")
        floor = evaluate_stream(noise_stream, windows, base_stream, budget=budget, on_progress=on_progress)
        noise = divergence_of(floor.tokens, seed)
    text_record = TextRecord(
        name=text.name,
        sha256=text.sha256,
        text_bytes=len(text.text.encode("utf-8")),
        tokens=len(tokens.ids),
        protocol=str(protocol),
        window=windows.window,
        windows=windows.count,
        scored_tokens=windows.count * windows.scored,
        begins_with_bos=tokens.bos_token_id is not None,
    )
    return EvaluationRecord(
        text=text_record,
        perplexity=perplexity_of(scores.nll, windows.covered_bytes),
        base=None if scores.base_nll is None else perplexity_of(scores.base_nll, windows.covered_bytes),
        divergence=None if scores.kl is None else divergence_of(scores, seed),
        routing=result.routing,
        noise=noise,
        seconds=time.perf_counter() - start,
    )


def _check(stream: LayerStream, windows: Windows, base_stream: LayerStream | None) -> None:
    positions = stream.config.max_position_embeddings
    if windows.window > positions:
        raise UsageError(f"window is {windows.window} tokens; the model has {positions} positions")
    if base_stream is None:
        return
    for name in ("vocab_size", "num_hidden_layers", "moe_num_experts"):
        found, expected = getattr(base_stream.config, name), getattr(stream.config, name)
        if found != expected:
            raise UsageError(f"the base has {name} {found}; the measured model has {expected}")
