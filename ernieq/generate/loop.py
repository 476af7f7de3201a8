"""The loop: the prompt once, then token after token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from ernieq.errors import CheckpointError, UsageError
from ernieq.generate.engine import Engine, make_engine, model_device
from ernieq.generate.options import GenerateOptions
from ernieq.generate.sampling import Sampler
from ernieq.generate.text import StopWatch, TextPieces
from ernieq.model import ErnieForCausalLM


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, the begin-of-text token first if the tokenizer has one.

    Raises:
        UsageError: there is nothing to begin with.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise UsageError("the prompt is empty, and the tokenizer has no begin-of-text token to begin with")
    return ids


def generate_text(
    model: ErnieForCausalLM,
    tokenizer: Any,
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    on_token: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Complete a text, piece by piece.

    Args:
        model: from ``load_model``.
        tokenizer: what ``transformers.AutoTokenizer`` loads from the same directory.
        prompt: what the text begins with.
        options: how to complete it.
        on_token: called with every token, whether or not it completes a piece.

    Yields:
        Pieces of text, never empty, that make up the completion.

    Raises:
        UsageError: the prompt is empty or longer than the model's positions.
        CheckpointError: the tokenizer has tokens that the model lacks.
    """
    options = options or GenerateOptions()
    ids = encode_prompt(tokenizer, prompt)
    ends = {*model.config.eos_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    pieces, watch = TextPieces(tokenizer, ids), StopWatch(options.stop)
    for token in generate_tokens(model, ids, options, ends=ends):
        if on_token is not None:
            on_token(token)
        if shown := watch.add(pieces.add(token)):
            yield shown
        if watch.stopped:
            return
    if shown := watch.add(pieces.finish()) + watch.finish():
        yield shown


def generate_tokens(
    model: ErnieForCausalLM,
    prompt_ids: Sequence[int],
    options: GenerateOptions | None = None,
    *,
    ends: Collection[int] = (),
) -> Iterator[int]:
    """Continue a sequence of tokens.

    Args:
        model: the model.
        prompt_ids: tokens to continue, at least one.
        options: how; stop strings have no meaning here.
        ends: tokens that end the sequence; they are not yielded.

    Yields:
        Token ids, at most ``max_tokens`` and as many as the model has positions for.

    Raises:
        UsageError: the prompt is empty, or as long as the model's positions or longer.
        CheckpointError: a token of the prompt is not in the model's vocabulary.
    """
    options = options or GenerateOptions()
    config = model.config
    room = config.max_position_embeddings - len(prompt_ids)
    if not prompt_ids or room < 1:
        raise UsageError(
            f"the prompt has {len(prompt_ids)} tokens; allowed are 1 to {config.max_position_embeddings - 1}"
        )
    if max(prompt_ids) >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer gives the token {max(prompt_ids)}; the model's vocabulary ends at "
            f"{config.vocab_size - 1}"
        )
    limit = min(options.max_tokens, room)
    engine = make_engine(model, len(prompt_ids) + limit)
    sampler = Sampler(options)
    choose = _choose_ahead if model_device(model).type == "cuda" else _choose
    for token in choose(engine, sampler, prompt_ids, limit):
        if token in ends:
            return
        yield token


def _choose(engine: Engine, sampler: Sampler, prompt_ids: Sequence[int], limit: int) -> Iterator[int]:
    logits = engine.prompt(prompt_ids)
    for count in range(1, limit + 1):
        token = sampler.choose(logits)
        yield token
        if count < limit:
            logits = engine.step(torch.tensor([token]))


def _choose_ahead(engine: Engine, sampler: Sampler, prompt_ids: Sequence[int], limit: int) -> Iterator[int]:
    """As ``_choose``, but the GPU is given its next step before the token is read: it never waits for Python.

    The step after the last token is done in vain.
    """
    logits = engine.prompt(prompt_ids)
    for count in range(1, limit + 1):
        token = sampler.draw(logits)
        if count < limit:
            logits = engine.step(token.clamp(min=0))
        yield sampler.read(token)
