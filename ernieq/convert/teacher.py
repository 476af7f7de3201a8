"""What the bf16 model says about calibration text, with one of its layers in memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.calibrate import narrow_layer
from ernieq.checkpoint import Checkpoint, load_embedding, load_final_norm, load_head
from ernieq.convert.overlap import read_layers
from ernieq.model import Rotary

_TOKENS_AT_ONCE = 2048  # whose activations are held: nothing of the size of a layer


class Teacher:
    """The bf16 model's states before its head for all windows, and the head itself.

    The states stay in the processor's memory; logits of all tokens would be too large.

    Args:
        checkpoint: the source.
        windows: (windows, length) int64.
        device: the device that computes, in float32.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor, device: torch.device) -> None:
        self._device = device
        self._head = load_head(checkpoint).to(device)
        self._states = self._run(checkpoint, windows)

    @torch.no_grad()
    def log_probs(self, states: Tensor) -> Tensor:
        """Log probabilities of the next token: (rows, hidden_size) to (rows, vocabulary) float32."""
        logits: Tensor = self._head(states.to(self._device))
        return logits.log_softmax(dim=-1)

    def states(self, windows: Tensor | slice) -> Tensor:
        """States of some windows by number, (windows, length, hidden_size) float32, on the processor."""
        return self._states[windows]

    @torch.no_grad()
    def _run(self, checkpoint: Checkpoint, windows: Tensor) -> Tensor:
        hidden: Tensor = load_embedding(checkpoint)(windows)
        rotary = Rotary(checkpoint.config).angles(torch.arange(windows.shape[1], device=self._device))
        for layer in read_layers(checkpoint, self._device):
            if self._device.type == "cuda":
                narrow_layer(layer, self._device)
            for part in self._parts(windows):
                hidden[part] = layer(hidden[part].to(self._device), rotary).cpu()
        norm = load_final_norm(checkpoint)
        for part in self._parts(windows):
            hidden[part] = norm(hidden[part])
        return hidden

    def _parts(self, windows: Tensor) -> list[slice]:
        step = max(1, _TOKENS_AT_ONCE // windows.shape[1])
        return [slice(start, start + step) for start in range(0, len(windows), step)]
