"""``open_stream``: a checkpoint, packed or not, one decoder layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ernieq.kernels import Backend
from ernieq.kernels.device import require_memory
from ernieq.load.materialize import LoadOptions, materialize
from ernieq.load.memory import stream_bytes
from ernieq.load.place import resolve_place
from ernieq.load.source import WeightSource, open_source, weight_bytes
from ernieq.model import (
    DecoderLayer,
    ErnieForCausalLM,
    ModelConfig,
    Rotary,
    expected_parameters,
    layer_parameters,
)


def open_stream(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelStream:
    """Open a checkpoint that may be larger than memory.

    Args:
        path: a directory, ``bundled:NAME``, or a hub id; packed or ordinary.
        device: where layers are put and computed: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``.
        backend: implementation of the kernels for packed weights on the CPU.
        threads: threads of the kernels; all processors by default.
        dtype: what it computes in; the router and softmaxes keep float32.

    Raises:
        CheckpointError: a tensor is missing or malformed.
        FormatError: a packed checkpoint breaks its format.
        UsageError: the device means nothing, or a backend of the CPU was asked for together with a GPU.
        BackendUnavailableError: the backend or device can't run here, or the GPU has too little memory.
    """
    place = resolve_place(device, backend)
    source = open_source(path)
    source.check_names()
    place.check(source)
    require_memory(place.device, stream_bytes(source, dtype), f"the largest layer of {path}")
    return ModelStream(source, LoadOptions(dtype, place.backend, threads, place.device))


class ModelStream:
    """A model whose layers are loaded when they are asked for.

    Shapes: B sequences, T tokens, N tokens of any sequences, H hidden width, V vocabulary.

    Attributes:
        device: where layers are put; states that they are given must be there.
        dtype: what layers compute in, and the states that they are given must have.
        config: the model's shape.
        rotary: its position encoding.
        tokenizer_directory: where its tokenizer is.
        base: what the manifest of a packed checkpoint names as its source; None for an ordinary one.
    """

    def __init__(self, source: WeightSource, options: LoadOptions) -> None:
        self._source = source
        self._options = options
        self._ends: ErnieForCausalLM | None = None
        self.device = options.device
        self.dtype = options.dtype
        self.config: ModelConfig = source.config
        self.rotary = Rotary(source.config)
        self.tokenizer_directory: Path = source.directory
        self.base: str | None = source.base

    def embed(self, token_ids: Tensor) -> Tensor:
        """Look tokens up: (B, T) int64, anywhere -> (B, T, H) on the stream's device."""
        hidden: Tensor = self._loaded_ends().model.embed_tokens(token_ids.to(self.device))
        return hidden

    def layers(self) -> Iterator[DecoderLayer]:
        """The decoder layers in order; may be called again.

        Only the layer that was yielded last is held, and not by the stream: whoever drops it before asking for
        the next holds one layer at a time. Embedding and head are let go.
        """
        self._ends = None
        return (self._load_layer(index) for index in range(self.config.num_hidden_layers))

    def head(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (N, H) of any dtype -> (N, V) float32 logits."""
        ends = self._loaded_ends()
        logits: Tensor = ends.lm_head(ends.model.norm(hidden.to(self.dtype)))
        return logits.float()

    def weight_bytes(self) -> dict[str, int]:
        """Bytes and parameters: total, decoder, quantized, parameters, quantized_parameters."""
        return weight_bytes(self._source)

    def _load_layer(self, index: int) -> DecoderLayer:
        with torch.device("meta"):
            layer = DecoderLayer(self.config, index)
        specs = layer_parameters(self.config, index)
        materialize(layer, specs, self._source, self._options, prefix=f"model.layers.{index}.")
        return layer.eval()

    def _loaded_ends(self) -> ErnieForCausalLM:
        """The model without its layers: embedding, final norm and head."""
        if self._ends is None:
            config = dataclasses.replace(self.config, num_hidden_layers=0)
            with torch.device("meta"):
                ends = ErnieForCausalLM(config)
            materialize(ends, expected_parameters(config), self._source, self._options)
            self._ends = ends.eval()
        return self._ends
