"""How long a conversion will take: two short measurements on this machine, and the work that the plan holds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ernieq.convert.plan import Plan
from ernieq.convert.recipe import Recipe
from ernieq.encode import EncodeOptions
from ernieq.kernels.precision import float32_products
from ernieq.kernels.viterbi import search_tiles
from ernieq.model import ModelConfig
from ernieq.trellis import TILE_WEIGHTS, VALUE_RMS, TrellisCode

# A GPU works on thousands of tiles at once and needs larger products to reach its speed.
_PROBE_TILES = {"cpu": 32, "cuda": 4096}
_PROBE_SIDE = {"cpu": 512, "cuda": 4096}

# Passes of a token through the active weights of a layer while it is calibrated: the bf16 stream, its
# activations on the quantized routing, the quantized stream, its activations for the Hessians.
_PASSES = 5


def estimate_seconds(
    config: ModelConfig,
    plan: Plan,
    recipe: Recipe,
    options: EncodeOptions,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - it can't be changed
    *,
    tuned: bool = False,
) -> float:
    """Seconds that encoding, calibration and tuning will take, from a probe of well under a second.

    Reading, writing and hashing are left out: they overlap with nothing but cost little beside these.

    Args:
        config: of the model.
        plan: what is encoded.
        recipe: the sample, the code, the steps of tuning.
        options: how matrices are encoded.
        device: where.
        tuned: whether scales and norms are tuned.
    """
    weights_at: dict[float, int] = {}
    for module, bits in plan.modules.items():
        weights_at[bits] = weights_at.get(bits, 0) + plan.module_weights[module]
    encoding = sum(
        weights / _encode_rate(TrellisCode(bits, recipe.encode.state_bits), options, device)
        for bits, weights in weights_at.items()
    )
    length = min(recipe.calibration.window, config.max_position_embeddings)
    tokens = recipe.calibration.windows * length
    operations = tokens * _operations_per_token(config, length)
    if tuned:
        operations += _tuning_operations(config, recipe, tokens)
    return encoding + operations / _matmul_rate(device)


def _encode_rate(code: TrellisCode, options: EncodeOptions, device: torch.device) -> float:
    """Weights a second of the trellis search."""
    wanted = torch.randn(_PROBE_TILES[device.type], TILE_WEIGHTS, device=device) * VALUE_RMS

    def search(targets: Tensor) -> None:
        search_tiles(
            targets,
            code,
            first_pass_steps=options.first_pass_steps,
            backend=options.backend,
            threads=options.threads,
        )

    search(wanted[:2])
    return wanted.numel() / _seconds(lambda: search(wanted), device)


def _matmul_rate(device: torch.device) -> float:
    """Multiplications and additions a second of a matrix product of typical size."""
    side = _PROBE_SIDE[device.type]
    left, right = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    with float32_products(device, tensor_cores=True):
        left @ right

        def multiply() -> None:
            for _ in range(8):
                left @ right

        return 8 * 2 * side**3 / _seconds(multiply, device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long some work takes, with all that it leaves to a GPU."""
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tuning_operations(config: ModelConfig, recipe: Recipe, tokens: int) -> float:
    """Multiplications and additions of tuning: the bf16 model once, the quantized one there and back a step."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = 2 * hidden * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    widths = (inner * active for inner, active in (_feed_forward(config, index) for index in range(layers)))
    active = layers * attention + 3 * hidden * sum(widths)
    steps = recipe.tune.steps * recipe.tune.batch_tokens
    return 2 * (tokens * active + steps * (2 * active + 3 * hidden * config.vocab_size))


def _feed_forward(config: ModelConfig, index: int) -> tuple[int, int]:
    """Hidden units of a layer's MLP or of one expert, and how many of them a token meets."""
    if not config.is_moe_layer(index):
        return config.intermediate_size, 1
    return config.moe_intermediate_size, config.moe_k + config.moe_num_shared_experts


def _operations_per_token(config: ModelConfig, length: int) -> float:
    """Multiplications and additions for one calibration token, all layers together."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    cached = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * heads + 2 * cached) + heads * length  # projections; half the score matrix, twice
    total = 0.0
    for index in range(config.num_hidden_layers):
        inner, active = _feed_forward(config, index)
        grams = (2 + active) * hidden**2 + active * (inner**2 + inner * hidden) + heads * (heads + hidden)
        total += 2 * attention + _PASSES * active * 3 * hidden * inner + grams
    return 2 * total
