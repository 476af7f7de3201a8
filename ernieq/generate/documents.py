"""Text that a model writes itself: many sequences at once, each token drawn from the whole distribution.

A text of its own is what a model has to say wherever its weights are used, there is as much of it as one likes,
and the model has not learnt it by heart. Source: LLM-QAT (arXiv 2305.17888), where it replaces training data;
Williams et al., "Self-calibration for language model quantization" (arXiv 2410.17170).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ernieq.errors import UsageError
from ernieq.generate.sampling import damaged
from ernieq.model import ErnieForCausalLM, Experts, KVCache, SparseMlp, StackedExperts

LENGTH = 2048  # tokens of a sequence
_MOST_SEQUENCES = 512
_ON_CPU = 32
_FREE_SHARE = 0.6  # of a GPU's free memory, for keys and values
_SHORTEST = 16  # tokens; what is left of a sequence behind the last end of a document may be a word


@torch.no_grad()
def sample_documents(
    model: ErnieForCausalLM,
    tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Iterator[list[int]]:
    """Let a model write documents.

    Args:
        model: the model, on the device that computes.
        tokens: at least so many are drawn.
        seed: of the draw. The same seed gives the same documents on the same device and version of torch.
        temperature: what logits are divided by.
        on_tokens: called with the number of tokens drawn since the last call.

    Yields:
        Token ids of a document, without those that begin and end it.

    Raises:
        NonFiniteError: a logit is NaN or infinite.
        UsageError: the configuration names no token that begins or ends a document.
    """
    if not _ends(model):
        raise UsageError("config.json has neither bos_token_id nor eos_token_id: no text can begin")
    length = min(LENGTH, model.config.max_position_embeddings)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    sequences = min(_sequences(model, length, device), -(-tokens // length))
    drawn = 0
    while drawn < tokens:
        rows = _rows(model, (sequences, length), temperature, generator, on_tokens)
        drawn += rows.numel()
        for row in rows.tolist():
            yield from _documents(row, _ends(model))


def stack_experts(model: ErnieForCausalLM) -> None:
    """Put batched products in the place of all plain routed experts, one layer after the other."""
    for module in model.modules():
        if isinstance(module, SparseMlp) and type(module.experts) is Experts:
            module.experts = StackedExperts.of(module.experts)


def _rows(
    model: ErnieForCausalLM,
    shape: tuple[int, int],
    temperature: float,
    generator: torch.Generator,
    on_tokens: Callable[[int], None],
) -> Tensor:
    """Sequences of one length, on the processor; behind the end of a document another one begins."""
    sequences, length = shape
    device, dtype = generator.device, next(model.model.norm.parameters()).dtype
    cache = KVCache(model.config, sequences, length, dtype, device)
    first, *_ = _ends(model)
    begin = torch.full((sequences, 1), first, device=device)
    ends = torch.tensor(model.config.eos_token_ids, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    token, drawn = begin, []
    for _ in range(length):
        logits = model(token, cache, last_only=True)[:, -1]  # (sequences, vocabulary)
        finite &= logits.isfinite().all()
        probabilities = (logits.nan_to_num(0.0, 0.0, 0.0) / temperature).softmax(dim=-1)
        found = torch.multinomial(probabilities, 1, generator=generator)
        token = torch.where(torch.isin(token, ends), begin, found)
        drawn.append(token)
        on_tokens(sequences)
    if not finite:
        raise damaged()
    return torch.cat(drawn, dim=1).cpu()


def _ends(model: ErnieForCausalLM) -> list[int]:
    """Tokens that begin or end a document; the first is what every sequence begins with."""
    bos = model.config.bos_token_id
    return [*([] if bos is None else [bos]), *model.config.eos_token_ids]


def _documents(row: list[int], ends: Sequence[int]) -> Iterator[list[int]]:
    """A sequence cut where documents end and begin."""
    document: list[int] = []
    for token in [*row, ends[0]]:
        if token not in ends:
            document.append(token)
            continue
        if len(document) >= _SHORTEST:
            yield document
        document = []


def _sequences(model: ErnieForCausalLM, length: int, device: torch.device) -> int:
    """How many sequences are drawn at once."""
    if device.type == "cpu":
        return _ON_CPU
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    each = 2 * heads * length * next(model.model.norm.parameters()).element_size()
    free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(_MOST_SEQUENCES, int(_FREE_SHARE * free) // each))
