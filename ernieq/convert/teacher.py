"""What the bf16 model says about calibration text, with one of its layers in memory at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ernieq.calibrate import narrow_layer, stay_on_gpu
from ernieq.checkpoint import Checkpoint, load_embedding, load_final_norm, load_head
from ernieq.convert.overlap import read_layers
from ernieq.convert.workplace import Workplace
from ernieq.model import Rotary

# Tokens whose activations are held. A GPU waits for the launches of every expert, and has room: one activation
# of the 21B model's dense layer takes 1.6 GB, and the quantized model is not there yet.
_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}


def windows_at_once(length: int, device: torch.device) -> int:
    """Windows of so many tokens that go through a layer together."""
    return max(1, _TOKENS_AT_ONCE[device.type] // length)


class Teacher:
    """The bf16 model's states before its head for all windows, and the head itself.

    The states stay in the processor's memory; logits of all tokens would be too large. A GPU that has room for
    them keeps them while it works on them.

    Args:
        checkpoint: the source.
        windows: (windows, length) int64.
        workplace: the device that computes, in float32.
    """

    def __init__(self, checkpoint: Checkpoint, windows: Tensor, workplace: Workplace) -> None:
        self._device = workplace.device
        self._head = load_head(checkpoint).to(self._device)
        vram, width = workplace.vram_bytes, checkpoint.config.hidden_size
        stay = vram is not None and stay_on_gpu(windows.numel(), width, vram)
        self._home = self._device if stay else torch.device("cpu")
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
        hidden: Tensor = load_embedding(checkpoint)(windows).to(self._home)
        parts = self._parts(windows)
        rotary = Rotary(checkpoint.config).angles(torch.arange(windows.shape[1], device=self._device))
        for layer in read_layers(checkpoint, self._device):
            if self._device.type == "cuda":
                narrow_layer(layer, self._device)
            for part in parts:
                hidden[part] = layer(hidden[part].to(self._device), rotary).to(self._home)
        norm = load_final_norm(checkpoint).to(self._home)
        for part in parts:
            hidden[part] = norm(hidden[part])
        return hidden.cpu()

    def _parts(self, windows: Tensor) -> list[slice]:
        step = windows_at_once(windows.shape[1], self._device)
        return [slice(start, start + step) for start in range(0, len(windows), step)]
