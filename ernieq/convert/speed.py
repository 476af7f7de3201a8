"""How fast this machine encodes and calibrates: the real code on a little of the real shapes, for seconds.

The weights are drawn, from a generator of their own; nothing of it reaches the result.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ernieq.calibrate import Streams, narrow_layer
from ernieq.convert.groups import Group, Target
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.recipe import Recipe
from ernieq.convert.snapshots import Mark
from ernieq.convert.workload import GroupShape, calibration_work, encoding_products
from ernieq.encode import Batches, EncodeOptions, EncodingResult, encode_batch, encode_matrices
from ernieq.kernels.precision import float32_products
from ernieq.model import DecoderLayer, ModelConfig, Rotary
from ernieq.trellis import TILE_SIDE, TrellisCode

# Tiles that are searched at once in a probe, at most; a GPU always has so many.
_TILES = {"cpu": 64, "cuda": 4096}
_BLOCKS = 2  # of 16 columns
_REPEATS = 3
# A code whose search takes no time beside all else that encoding does.
_SHORT_CODE = TrellisCode(2, 10)
_WIDEST = {"cpu": 768, "cuda": 2560}  # of a Hessian that is factored; wider ones are reckoned from it
_HESSIANS = {"cpu": 1, "cuda": 8}  # that are factored together: most are those of experts, which go in batches
_PRODUCT_SIDE = {"cpu": 512, "cuda": 4096}
# Multiplications of the layer that is calibrated, weights of its experts, and tokens. A layer too wide for
# so many tokens is made narrower: on few of them the solving for corrections would be all that is measured.
_WORK = {"cpu": 7e10, "cuda": 2e13}
_EXPERT_WEIGHTS = {"cpu": 7_000_000, "cuda": 1_000_000_000}
_FEWEST_TOKENS = 512
_NARROWER = (1, 2, 4, 8, 16)
_LONG = 0.5  # seconds; what takes longer is measured once, as it comes


class TargetsAlone:
    """In place of an encoder: works out what matrices should become, and leaves them as they are."""

    def encode(
        self, _layer: int | None, _groups: Sequence[Group], aim: Callable[[], Sequence[Target]]
    ) -> dict[str, EncodingResult]:
        """Nothing, after the target of every group has been worked out."""
        aim()
        return {}


class Speed:
    """Rates of one recipe on one device, each measured when it is first asked for.

    Args:
        config: of the model.
        recipe: the code and the settings of the encoder.
        options: how matrices are encoded.
        device: where.
    """

    def __init__(
        self, config: ModelConfig, recipe: Recipe, options: EncodeOptions, device: torch.device
    ) -> None:
        self._config, self._recipe, self._device = config, recipe, device
        self._options = dataclasses.replace(
            options, damping=recipe.encode.damping, first_pass_steps=recipe.encode.first_pass_steps
        )
        self._generator = torch.Generator(device).manual_seed(recipe.seed)
        self._search: dict[tuple[int, float], float] = {}
        self._factoring: dict[int, float] = {}
        self._product = 0.0

    def encoding(self, shape: GroupShape) -> float:
        """Seconds that a group takes to encode."""
        search = shape.rows * shape.columns * self._search_seconds(shape)
        return search + self._factoring_seconds(shape.columns) + self.products(encoding_products(shape))

    def products(self, count: float) -> float:
        """Seconds of so many multiplications of large matrix products."""
        if not self._product:
            side = _PRODUCT_SIDE[self._device.type]
            left, right = (self._drawn(side, side) for _ in range(2))
            with float32_products(self._device, tensor_cores=True):
                self._product = measured_seconds(lambda: left @ right, self._device) / side**3
        return count * self._product

    def calibration(self, tokens: int, length: int) -> float:
        """Seconds that the passes over a sample take, all layers together.

        One layer is calibrated on a few tokens; the others are reckoned from their work.
        """
        config, index = self._config, self._probed_layer()
        smaller, few = self._probed_size(index, tokens, length)
        few_length = min(length, few)
        few -= few % few_length
        seconds = self._layer_seconds(smaller, index, few // few_length, few_length)
        rate = seconds / self._work(smaller, index, few, few_length)
        layers = range(config.num_hidden_layers)
        return rate * sum(self._work(config, layer, tokens, length) for layer in layers)

    def _probed_size(self, index: int, tokens: int, length: int) -> tuple[ModelConfig, int]:
        """The widest layer, and the most tokens, whose calibration takes about a second."""
        most = _WORK[self._device.type]
        for divisor in _NARROWER:
            smaller, few = self._narrower(divisor), tokens
            while few > _FEWEST_TOKENS and self._work(smaller, index, few, min(length, few)) > most:
                few = max(_FEWEST_TOKENS, few // 2)
            if self._work(smaller, index, few, min(length, few)) <= most:
                break
        return smaller, few

    def _work(self, config: ModelConfig, index: int, tokens: int, length: int) -> float:
        return calibration_work(config, index, tokens, length, self._device)

    def _narrower(self, divisor: int) -> ModelConfig:
        """The model with widths divided, and as many experts as are quickly drawn."""
        config = self._config
        hidden = config.hidden_size // divisor
        inner = config.moe_intermediate_size // divisor
        experts = max(config.moe_k, _EXPERT_WEIGHTS[self._device.type] // max(1, 3 * hidden * inner))
        return dataclasses.replace(
            config,
            hidden_size=hidden,
            intermediate_size=config.intermediate_size // divisor,
            moe_intermediate_size=inner,
            head_dim=2 * max(1, config.head_dim // divisor // 2),
            moe_num_experts=min(config.moe_num_experts, experts),
        )

    def _probed_layer(self) -> int:
        """A layer with experts if there is one: most are like it."""
        layers = range(self._config.num_hidden_layers)
        return next((index for index in layers if self._config.is_moe_layer(index)), 0)

    def _search_seconds(self, shape: GroupShape) -> float:
        """Seconds a weight."""
        most = _TILES[self._device.type]
        tiles = most if self._device.type == "cuda" else min(most, shape.rows // TILE_SIDE)
        key = tiles, shape.bits
        if key not in self._search:
            code = TrellisCode(shape.bits, self._recipe.encode.state_bits)
            weight = self._drawn(tiles * TILE_SIDE, _BLOCKS * TILE_SIDE)
            self._search[key] = self._encode_seconds(weight, code) / weight.numel()
        return self._search[key]

    def _factoring_seconds(self, width: int) -> float:
        """Seconds that the Hessian of a group takes: rotated, its blocks put in order, factored."""
        if width not in self._factoring:
            probed = min(width, _WIDEST[self._device.type])
            weight, many = self._drawn(TILE_SIDE, probed), _HESSIANS[self._device.type]
            seconds = self._encode_seconds(weight, _SHORT_CODE, many) / many
            self._factoring[width] = seconds * (width / probed) ** 3
        return self._factoring[width]

    def _encode_seconds(self, weight: Tensor, code: TrellisCode, many: int = 1) -> float:
        """Encode a drawn matrix, or many like it together."""
        width, stack = weight.shape[1], {"probe": weight}
        hessian, signs = torch.eye(width, device=self._device), np.ones(width, dtype=np.int8)
        if many == 1:
            return measured_seconds(
                lambda: encode_matrices(stack, hessian, signs, code, self._options), self._device
            )
        stacks, hessians = [stack] * many, [hessian] * many
        return measured_seconds(
            lambda: encode_batch(stacks, hessians, signs, code, self._options), self._device
        )

    def _layer_seconds(self, config: ModelConfig, index: int, windows: int, length: int) -> float:
        """Calibrate a drawn layer, and encode nothing of it."""
        batches = Batches(config.moe_num_experts if self._device.type == "cuda" else 1, "experts")
        quantizer = LayerQuantizer(config, self._recipe.encode, TargetsAlone(), batches)
        angles = Rotary(config).angles(torch.arange(length))
        rotary = angles[0].to(self._device), angles[1].to(self._device)

        def calibrate() -> float:
            layer, hidden = self.drawn_layer(config, index), self._drawn(windows, length, config.hidden_size)
            streams = Streams(hidden, hidden.clone())
            return _timed(lambda: quantizer.run(Mark(index), layer, streams, rotary), self._device)

        with torch.no_grad():
            first = calibrate()  # memory is taken from the system for the first time
            return first if first > 4 * _LONG else min(first, calibrate())

    def drawn_layer(self, config: ModelConfig, index: int) -> DecoderLayer:
        """A layer as calibration has it: float32 on a CPU, 16 bits that are widened on a GPU."""
        narrow = self._device.type == "cuda"
        with torch.device("meta"):
            layer = DecoderLayer(config, index).to(torch.bfloat16 if narrow else torch.float32)
        drawn = {}
        for name, tensor in layer.state_dict().items():  # Module.to_empty would import sympy first
            drawn[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
            drawn[name].normal_(std=tensor.shape[-1] ** -0.5, generator=self._generator)
        layer.load_state_dict(drawn, assign=True)
        layer.requires_grad_(False).eval()
        return narrow_layer(layer, self._device) if narrow else layer

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)


def measured_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few times, after one that is not counted; the first, if it is long."""
    first = _timed(work, device)
    if first > _LONG:
        return first
    return statistics.median(_timed(work, device) for _ in range(_REPEATS))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes, with all that it leaves to a GPU."""
    _finish(device)
    started = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - started


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
