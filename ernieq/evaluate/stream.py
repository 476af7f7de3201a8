"""Windows through a model, one decoder layer in memory at a time.

Each layer is loaded once, applied to all windows in batches, and let go. The hidden states of all windows
are held in float32 where the stream computes (on a GPU: there), updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol as StructuralType

import torch
from torch import Tensor, nn

from ernieq.model import DecoderLayer, ModelConfig, Rotary

OnProgress = Callable[[str, int, int], None]


class LayerStream(StructuralType):
    """What this package needs of `ernieq.load.ModelStream`.

    Shapes: B windows, T tokens, N tokens of any windows, H hidden, V vocabulary.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def dtype(self) -> torch.dtype:
        """What its layers compute in."""

    @property
    def rotary(self) -> Rotary:
        """The model's rotary embedding."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """(B, T) int64, on the CPU, to (B, T, H) where the stream computes."""

    def layers(self) -> Iterator[DecoderLayer]:
        """The decoder layers in order, each loaded when asked for; may be called again."""

    def head(self, hidden: Tensor) -> Tensor:
        """(N, H) to (N, V) float32 logits: the final norm and the head."""


class RoutingTrace:
    """Experts selected by each MoE layer, for every token of every window, in order.

    Attributes:
        selected: layer index to (tokens, k) int16, on the CPU.
    """

    def __init__(self) -> None:
        self.selected: dict[int, Tensor] = {}

    @contextmanager
    def watch(self, index: int, layer: DecoderLayer) -> Iterator[None]:
        """Record what ``layer`` selects while the context is open; dense layers are passed over."""
        if not layer.is_moe:
            yield
            return
        parts: list[Tensor] = []

        def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            states = arguments[0]
            parts.append(layer.mlp.route(states.reshape(-1, states.shape[-1])).selected.to(torch.int16).cpu())

        handle = layer.mlp.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()
        self.selected[index] = torch.cat(parts)


def final_states(
    stream: LayerStream,
    token_ids: Tensor,
    *,
    batch: int,
    trace: RoutingTrace | None = None,
    label: str = "layers",
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Hidden states after the last layer, before the final norm.

    Args:
        stream: the model.
        token_ids: (windows, window) int64.
        batch: windows per step.
        trace: is filled with the experts selected, if given.
        label: the first argument of ``on_progress``.
        on_progress: called with the label, layers done and layers in all.

    Returns:
        (windows, window, hidden) float32 on the device of the stream.
    """
    total = stream.config.num_hidden_layers
    parts = torch.split(token_ids, batch)
    with torch.inference_mode():
        hidden = torch.cat([stream.embed(part).float() for part in parts])  # (windows, window, hidden)
        rotary = stream.rotary.angles(torch.arange(token_ids.shape[1], device=hidden.device))
        layers = stream.layers()
        for index in range(total):
            layer = next(layers)
            if trace is None:
                _apply(layer, hidden, rotary, batch, stream.dtype)
            else:
                with trace.watch(index, layer):
                    _apply(layer, hidden, rotary, batch, stream.dtype)
            del layer  # or it would stay in memory while the next one is loaded
            if on_progress is not None:
                on_progress(label, index + 1, total)
    return hidden


def _apply(
    layer: DecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor], batch: int, dtype: torch.dtype
) -> None:
    """Move states behind a layer; float32 holds those of a narrower dtype without loss."""
    for part in torch.split(hidden, batch):
        part.copy_(layer(part.to(dtype), rotary))
