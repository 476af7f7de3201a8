"""How much work a conversion is, counted from the configuration: what an estimate multiplies its rates with.

Calibration is counted in multiplications (with their additions) of matrix products, pass by pass as
``calibrate/attention.py`` and ``calibrate/mlp.py`` make them; h is the hidden size, q and v the widths of
queries and of keys or values, i that of an MLP's hidden units. Everything between the products (norms, rotary
angles, activations) is left to the rate, which is measured on the same passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ernieq.calibrate.mlp import PRIOR_TOKENS
from ernieq.convert.groups import EMBEDDING, HEAD, full_name
from ernieq.convert.stored import layer_groups
from ernieq.kernels.token_sums import gram_entries
from ernieq.model import ModelConfig, expected_parameters

# A multiplication of a float64 solve takes so much longer than one of a float32 product.
_DOUBLE = 4.0


@dataclass(frozen=True)
class GroupShape:
    """Matrices that are encoded together: rows of all of them, columns, bits a weight."""

    rows: int
    columns: int
    bits: float


def encoded_groups(config: ModelConfig, modules: Mapping[str, float]) -> Counter[GroupShape]:
    """How many groups of every shape are encoded; what shares an input and has other bits is a group too.

    Args:
        config: of the model.
        modules: bits of every module that is quantized.
    """
    shapes = {name: spec.shape for name, spec in expected_parameters(config).items()}
    groups: list[tuple[str, ...]] = [(EMBEDDING,), (HEAD,)]
    for index in range(config.num_hidden_layers):
        groups += [
            tuple(full_name(index, name) for name in group.names) for group in layer_groups(config, index)
        ]
    found: Counter[GroupShape] = Counter()
    for group in groups:
        rows: Counter[float] = Counter()
        for module in group:
            if module in modules:
                rows[modules[module]] += shapes[f"{module}.weight"][0]
        for bits, count in rows.items():
            found[GroupShape(count, shapes[f"{group[0]}.weight"][1], bits)] += 1
    return found


def encoding_products(shape: GroupShape) -> float:
    """Multiplications of encoding a group beside the search: errors fed back, scales fitted, errors taken."""
    return 3.5 * shape.rows * shape.columns**2


def calibration_work(config: ModelConfig, index: int, tokens: int, length: int, device: torch.device) -> float:
    """Multiplications of calibrating one layer, those of the solving for its corrections as long as they take.

    Args:
        config: of the model.
        index: number of the layer.
        tokens: of the sample.
        length: tokens of a window.
        device: where; a CPU works out half of a symmetric result.
    """
    return calibration_products(config, index, tokens, length, device) + _DOUBLE * _solves(config, index)


def calibration_products(
    config: ModelConfig, index: int, tokens: int, length: int, device: torch.device
) -> float:
    """Multiplications of the float32 matrix products of calibrating one layer; as ``calibration_work``."""
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    v = config.num_key_value_heads * config.head_dim
    gram = partial(gram_entries, device=device)
    moments = gram(h) + h**2 + gram(q) + h * q
    contexts = 2 * (h * (q + 2 * v) + q * length)  # scores and their sums, the upper half left out
    attention = tokens * (moments + contexts + 3 * h * q) + (q + 2 * v) * h**2
    if config.is_moe_layer(index):
        return attention + _experts(config, tokens, gram)
    i = config.intermediate_size
    inputs, behind = gram(h) + h**2 + 3 * h * i, 8 * h * i + gram(i)
    return attention + tokens * (inputs + behind) + 2 * i * h**2


def feed_forward(config: ModelConfig, index: int) -> tuple[int, int]:
    """Hidden units of a layer's MLP or of one expert, and how many of them a token meets."""
    if not config.is_moe_layer(index):
        return config.intermediate_size, 1
    return config.moe_intermediate_size, config.moe_k + config.moe_num_shared_experts


def _experts(config: ModelConfig, tokens: int, gram: Callable[[int], int]) -> float:
    h, i, count = config.hidden_size, config.moe_intermediate_size, config.moe_num_experts
    shared = config.moe_num_shared_experts * i
    inputs = gram(h) + h**2 + 3 * h * (config.moe_k * i + shared)
    routed = config.moe_k * (gram(h) + 7 * h * i + gram(i))
    prior = len(range(0, tokens, max(1, tokens // max(PRIOR_TOKENS, 2 * i)))) * (6 * h * i + gram(i))
    corrections = 2 * (count * i + shared) * h**2
    behind = 8 * h * shared + gram(shared)
    return tokens * (inputs + routed + behind) + count * prior + corrections


def _solves(config: ModelConfig, index: int) -> float:
    """Multiplications in float64: a matrix of every input is factored and solved for its corrections."""
    h, q = config.hidden_size, config.num_attention_heads * config.head_dim
    work = 2 * _solve(h, h) + _solve(q, h)
    if not config.is_moe_layer(index):
        return work + _solve(config.intermediate_size, h)
    i = config.moe_intermediate_size
    return work + config.moe_num_experts * _solve(i, h) + _solve(config.moe_num_shared_experts * i, h)


def _solve(width: int, rows: int) -> float:
    return width**3 / 3 + rows * width**2
