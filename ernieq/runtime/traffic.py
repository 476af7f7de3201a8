"""How many bytes a step has to read: the floor under its time on any processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ernieq.model import ModelConfig, ParameterRole, ParameterSpec, expected_parameters

# Bytes of a weight as it lies in memory, by its name in the checkpoint.
WeightBytes = Mapping[str, int]


def weight_bytes(config: ModelConfig, size: Callable[[str, ParameterSpec], int]) -> dict[str, int]:
    """Ask the size in memory of every weight of a model; a tied head has no entry of its own."""
    return {name: size(name, spec) for name, spec in expected_parameters(config).items()}


def step_bytes(config: ModelConfig, weights: WeightBytes, *, batch: int, context: int, cache_bytes: int) -> int:
    """Bytes read by a step of one token for each sequence.

    All weights count but rows of the embedding, which are few, and experts that no token selects: of E experts,
    of which each token takes k, a batch reads ``E (1 - (1 - k / E) ** batch)`` if choices are independent.

    Args:
        config: the model.
        weights: what each weight takes in memory.
        batch: sequences.
        context: tokens that each has in its cache.
        cache_bytes: bytes of a number in the cache.
    """
    share = expert_share(config, batch)
    total = 0.0
    for name, spec in expected_parameters(config).items():
        if spec.role is ParameterRole.EMBEDDING and not config.tie_word_embeddings:
            continue
        total += weights[name] * (share if spec.role is ParameterRole.ROUTED_EXPERT else 1.0)
    width = config.num_key_value_heads * config.head_dim
    return round(total) + 2 * config.num_hidden_layers * width * cache_bytes * batch * context


def expert_share(config: ModelConfig, batch: int) -> float:
    """Share of the experts that a batch of tokens selects."""
    if not config.moe_num_experts:
        return 0.0
    untouched: float = (1 - config.moe_k / config.moe_num_experts) ** batch
    return 1 - untouched


def step_weights(config: ModelConfig, *, batch: int) -> int:
    """Weights multiplied by a step, an expert once for each token that selects it: what has to be decoded."""
    total = 0
    for spec in expected_parameters(config).values():
        rows, columns = (*spec.shape, 1)[:2]
        if spec.role is ParameterRole.EMBEDDING and not config.tie_word_embeddings:
            continue
        if spec.role is ParameterRole.ROUTED_EXPERT:
            total += rows * columns * config.moe_k * batch // config.moe_num_experts
        else:
            total += rows * columns
    return total
