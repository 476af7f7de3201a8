"""How fast this machine tunes: a layer of each kind and the head, there and back, with the modules of tuning.

A GPU waits for small kernels in a small model and for products in a large one, so steps are measured and not
reckoned from their products. The weights are drawn; nothing of it reaches the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ernieq.convert.distill import CHECKS, HELD_OUT, LOGIT_ROWS, TOKENS_AT_ONCE
from ernieq.convert.learnt import LearntWeight, Recomputed, ScaledLinear, TunableNorm, TunableRouter
from ernieq.convert.recipe import TuneSettings
from ernieq.convert.speed import Speed, measured_seconds
from ernieq.convert.teacher import windows_at_once
from ernieq.convert.workload import feed_forward
from ernieq.kernels.precision import float32_products
from ernieq.model import DecoderLayer, Experts, ModelConfig, RmsNorm, Rotary, StackedExperts
from ernieq.model.mlp import Router, RouterStatics

_WORK = {"cpu": 1e10, "cuda": 1e15}  # multiplications of a layer that is probed, more or less


class TuningSpeed:
    """Measures the parts of tuning.

    Args:
        speed: of the device; draws the bf16 model's layers.
        config: of the model.
        settings: of the tuning.
        length: tokens of a window.
        device: where.
        narrow: whether the layers are held in bfloat16 and compute twice.
    """

    def __init__(
        self,
        speed: Speed,
        config: ModelConfig,
        settings: TuneSettings,
        length: int,
        device: torch.device,
        *,
        narrow: bool,
    ) -> None:
        self._speed, self._config, self._settings = speed, config, settings
        self._device, self._narrow = device, narrow
        self._generator = torch.Generator(device).manual_seed(0)
        self._length = min(settings.window, length)
        kinds = Counter(config.is_moe_layer(index) for index in range(config.num_hidden_layers))
        first = {config.is_moe_layer(index): index for index in reversed(range(config.num_hidden_layers))}
        self._layers = {first[kind]: count for kind, count in kinds.items()}  # one of each kind
        self._windows = self._affordable(max(1, TOKENS_AT_ONCE // self._length))

    def seconds(self, tokens: int) -> float:
        """Of the bf16 model once, of all steps, and of the looks at the text that is held out.

        Args:
            tokens: of the calibration text.
        """
        with float32_products(self._device, tensor_cores=True):
            times = {index: self._layer_seconds(index) for index in self._layers}
            head = self._head_seconds()
            teacher = sum(count * self._teacher_seconds(index) for index, count in self._layers.items())
        there, both = (
            sum(count * times[index][way] for index, count in self._layers.items()) for way in (0, 1)
        )
        at_once = self._windows * self._length
        looks = (1 + min(CHECKS, self._settings.steps)) * tokens / HELD_OUT / at_once
        steps = self._settings.steps * self._settings.batch_tokens / at_once
        return tokens * teacher + steps * (both + head[1]) + looks * (there + head[0])

    def _affordable(self, windows: int) -> int:
        """So many windows, or as many as a layer of them is probed in about a second."""
        config = self._config
        widths = (inner * active for inner, active in (feed_forward(config, index) for index in self._layers))
        work = self._length * config.hidden_size * (3 * max(widths) + 4 * config.hidden_size)
        while windows > 1 and windows * work > _WORK[self._device.type]:
            windows //= 2
        return windows

    def _teacher_seconds(self, index: int) -> float:
        """Of a token through a layer of the bf16 model, as ``Teacher`` runs it where the states have room."""
        layer = self._speed.drawn_layer(self._config, index)
        hidden, angles = self._inputs(self._affordable(windows_at_once(self._length, self._device)))
        with torch.no_grad():
            seconds = measured_seconds(lambda: layer(hidden, angles), self._device)
        return seconds / (hidden.shape[0] * hidden.shape[1])

    def _layer_seconds(self, index: int) -> tuple[float, float]:
        """Of all windows that are taken at once: there, and there and back."""
        with torch.device("meta"):
            layer = DecoderLayer(self._config, index)
        self._fill(layer.requires_grad_(False))
        probed: nn.Module = Recomputed(layer) if self._narrow else layer
        hidden, angles = self._inputs(self._windows)
        hidden.requires_grad_()

        def run() -> Tensor:
            output: Tensor = probed(hidden, angles)
            return output

        return self._there_and_back(run)

    def _inputs(self, windows: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states of so many windows before a layer, and the rotary angles of a window."""
        angles = Rotary(self._config).angles(torch.arange(self._length, device=self._device))
        return self._drawn(windows, self._length, self._config.hidden_size), angles

    def _head_seconds(self) -> tuple[float, float]:
        """As of a layer: the bf16 model's logits and the quantized one's, and their divergence."""
        tokens = self._windows * self._length
        rows, vocabulary = min(LOGIT_ROWS, tokens), self._config.vocab_size
        head = self._scaled(self._drawn(vocabulary, self._config.hidden_size))
        states = self._drawn(rows, self._config.hidden_size).requires_grad_()

        def run() -> Tensor:
            with torch.no_grad():
                target = head(states).log_softmax(dim=-1)
            found = head(states).log_softmax(dim=-1)
            return functional.kl_div(found, target, reduction="sum", log_target=True)

        there, both = self._there_and_back(run)
        return there * tokens / rows, both * tokens / rows

    def _there_and_back(self, run: Callable[[], Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            there = measured_seconds(run, self._device)
        with torch.enable_grad():
            return there, measured_seconds(lambda: run().sum().backward(), self._device)

    def _fill(self, parent: nn.Module) -> None:
        """Put modules of tuning with drawn weights in the place of those on the meta device."""
        for name, child in list(parent.named_children()):
            made = self._made(child)
            if made is None:
                self._fill(child)
            else:
                setattr(parent, name, made)

    def _made(self, child: nn.Module) -> nn.Module | None:
        config = self._config
        if isinstance(child, RmsNorm):
            return TunableNorm(self._learnt(config.hidden_size), config.rms_norm_eps)
        if isinstance(child, Router):
            return TunableRouter(self._learnt(*child.weight.shape))
        if isinstance(child, RouterStatics):
            return RouterStatics(config).to(self._device)
        if isinstance(child, Experts) and self._device.type == "cuda":
            wide = config.moe_num_experts, config.moe_intermediate_size, config.hidden_size
            values = self._values(*wide), self._values(*wide), self._values(wide[0], wide[2], wide[1])
            gate, up, down = (self._scales(value.shape[0] * value.shape[1]) for value in values)
            return StackedExperts(values, (gate, up, down))
        if isinstance(child, nn.Linear):
            return self._scaled(self._values(*child.weight.shape))
        return None

    def _scaled(self, values: Tensor) -> ScaledLinear:
        return ScaledLinear(values, self._scales(len(values)), None)

    def _scales(self, rows: int) -> Tensor:
        return torch.ones(rows, device=self._device).requires_grad_()

    def _learnt(self, *shape: int) -> LearntWeight:
        return LearntWeight(self._drawn(*shape), torch.bfloat16)

    def _values(self, *shape: int) -> Tensor:
        return self._drawn(*shape).to(torch.bfloat16 if self._narrow else torch.float32)

    def _drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device).mul_(shape[-1] ** -0.5)
