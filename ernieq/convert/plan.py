"""What a conversion will do, from the headers alone: bits of every tensor, sizes, memory, disk."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from ernieq.calibrate import stream_dtype
from ernieq.checkpoint import Checkpoint
from ernieq.convert.distill import LOGIT_ROWS, TOKENS_AT_ONCE
from ernieq.convert.recipe import KEEP, Part, Recipe
from ernieq.convert.sizes import header_bytes, packed_bytes, packed_header_bytes, shard_overhead
from ernieq.convert.tune import LARGEST_ON_CPU
from ernieq.convert.workplace import largest_layer
from ernieq.errors import RecipeError, ShapeError
from ernieq.model import ModelConfig, ParameterRole, expected_parameters
from ernieq.trellis import TILE_SIDE

PARTS = {
    ParameterRole.ROUTED_EXPERT: Part.ROUTED_EXPERTS,
    ParameterRole.SHARED_EXPERT: Part.SHARED_EXPERTS,
    ParameterRole.ATTENTION: Part.ATTENTION,
    ParameterRole.DENSE_MLP: Part.DENSE_MLP,
    ParameterRole.EMBEDDING: Part.EMBEDDING,
    ParameterRole.HEAD: Part.HEAD,
}
_FLOAT32 = 4
_DECODER = "model.layers."
_PROGRAM_BYTES = 600_000_000


@dataclass(frozen=True)
class PartPlan:
    """A part of the model in the plan: parameters, bits a weight in the packed rings, bytes with scales."""

    part: str
    parameters: int
    bits: float
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What will be written and what it takes.

    Args:
        modules: bits of every module that is quantized.
        parts: totals per part; what is kept or carried comes last.
        output_bytes: size of the packed checkpoint; an upper bound, a few bytes a tensor above it.
        decoder_bytes: of these, the tensors of the decoder layers, without headers: exact.
        memory_bytes: estimate of the peak of resident memory, the program itself included.
        module_weights: weights of every module that is quantized.
        state_bytes: disk space that saved hidden states take meanwhile, at most.
    """

    modules: dict[str, float]
    parts: tuple[PartPlan, ...]
    output_bytes: int
    decoder_bytes: int
    memory_bytes: int
    module_weights: dict[str, int]
    state_bytes: int

    @property
    def encoded_weights(self) -> int:
        """Weights that go through the trellis search."""
        return sum(self.module_weights.values())

    @property
    def parameters(self) -> int:
        """Parameters of the whole checkpoint."""
        return sum(part.parameters for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter of the whole checkpoint."""
        return 8 * self.output_bytes / self.parameters


def sample_tokens(config: ModelConfig, recipe: Recipe) -> int:
    """Calibration tokens, if the text is long enough."""
    settings = recipe.calibration
    return settings.windows * min(settings.window, config.max_position_embeddings)


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Plan a conversion; a checkpoint that can't be converted whole is refused here, before any work.

    Raises:
        CheckpointError: tensors are missing, have another shape or dtype, or have no place in the model.
        ShapeError: a matrix that is to be quantized has a side that is not a multiple of 16.
        RecipeError: a pattern of the recipe matches nothing that can be quantized, or nothing is quantized.
    """
    checkpoint.audit()
    modules: dict[str, float] = {}
    totals: dict[str, list[int]] = {str(part): [0, 0, 0] for part in PARTS.values()} | {"kept": [0, 0, 0]}
    quantizable: set[str] = set()
    expected = expected_parameters(checkpoint.config)
    decoder, source = 0, source_bytes(checkpoint)
    for name in checkpoint.names():
        info = checkpoint.info(name)
        parameters = prod(info.shape)
        part = PARTS.get(expected[name].role) if name in expected and name.endswith(".weight") else None
        module = name.removesuffix(".weight")
        bits: float = KEEP
        if part is not None:
            quantizable.add(module)
            bits = recipe.bits_of(module, part)
        row = totals["kept" if part is None else str(part)]
        row[0] += parameters
        if bits == KEEP:
            row[1] += 8 * info.nbytes
            row[2] += info.nbytes + header_bytes(name, info.shape, source)
            decoder += info.nbytes if name.startswith(_DECODER) else 0
            continue
        _check_sides(name, info.shape)
        modules[module] = bits
        row[1] += int(parameters * bits)  # exact: whole tiles, whole half bits
        data = packed_bytes(info.shape, bits)
        row[2] += data + packed_header_bytes(module, info.shape, source)
        decoder += data if name.startswith(_DECODER) else 0
    _check_patterns(recipe, quantizable)
    if not modules:
        raise RecipeError("the recipe keeps every tensor: there is nothing to quantize")
    parts = tuple(
        PartPlan(name, count, bits / count, size) for name, (count, bits, size) in totals.items() if count
    )
    weights = {module: prod(checkpoint.info(f"{module}.weight").shape) for module in modules}
    total = sum(part.bytes for part in parts) + shard_overhead(source)
    memory = _memory(checkpoint.config, recipe)
    parameters = sum(part.parameters for part in parts)
    if recipe.tune.enabled and parameters <= LARGEST_ON_CPU:
        memory = max(memory, _tuning_memory(checkpoint.config, recipe, parameters))
    return Plan(modules, parts, total, decoder, memory, weights, 2 * _snapshot_bytes(checkpoint.config, recipe))


def source_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of the source."""
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names())


def _snapshot_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Two streams of hidden states."""
    tokens = sample_tokens(config, recipe)
    return 2 * tokens * config.hidden_size * stream_dtype(tokens, config.hidden_size).itemsize


def _memory(config: ModelConfig, recipe: Recipe) -> int:
    """Peak of resident memory: program, two copies of the largest layer, the streams, Hessians at work."""
    windows, length = recipe.calibration.windows, min(recipe.calibration.window, config.max_position_embeddings)
    itemsize = stream_dtype(windows * length, config.hidden_size).itemsize
    # Streams before and behind a sub-layer, or contexts beside them: two pairs.
    streams = 4 * windows * length * config.hidden_size * itemsize
    embedding = 2 * config.vocab_size * config.hidden_size * _FLOAT32
    widest = max(config.hidden_size, config.intermediate_size, config.moe_intermediate_size)
    hessians = 8 * widest * widest * _FLOAT32
    return _PROGRAM_BYTES + streams + max(embedding, 2 * largest_layer(config) * _FLOAT32 + hessians)


def _tuning_memory(config: ModelConfig, recipe: Recipe, parameters: int) -> int:
    """Peak of resident memory while tuning: model, head and states of the bf16 one, activations, logits."""
    tokens = sample_tokens(config, recipe)
    vocabulary = config.vocab_size * config.hidden_size
    inner = (config.moe_k + config.moe_num_shared_experts) * config.moe_intermediate_size
    active = config.num_hidden_layers * (12 * config.hidden_size + 4 * max(inner, config.intermediate_size))
    held = parameters + vocabulary + tokens * config.hidden_size
    working = TOKENS_AT_ONCE * active + 6 * LOGIT_ROWS * config.vocab_size
    return _PROGRAM_BYTES + _FLOAT32 * (held + working)


def _check_sides(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or any(side % TILE_SIDE for side in shape):
        raise ShapeError(
            f"{name} has shape {tuple(shape)}; the trellis code needs sides that are multiples of {TILE_SIDE} "
            "(keep it with 16 bits in the recipe)"
        )


def _check_patterns(recipe: Recipe, quantizable: set[str]) -> None:
    for pattern in recipe.modules:
        if not any(fnmatchcase(module, pattern) for module in quantizable):
            raise RecipeError(
                f"the recipe's pattern {pattern!r} matches no module that can be quantized "
                "(router, bias and norms never are)"
            )
