"""Writes small WINT2 checkpoints in FastDeploy's layout, and says in plain Python what they stand for.

Everything here is written from the description (WINT2.md), forward where the package goes backward, element by
element where the package computes with tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.tiny import TinyOptions, tiny_config, tiny_tensors, write_tensors, write_tokenizer

Array = NDArray[Any]
OPTIONS = TinyOptions(
    hidden=128, expert_width=128, intermediate=128, heads=4, kv_heads=2, head_dim=32, layers=4, tied=False
)
INT4_LAYER = 1  # its experts have 4 bits, those of later layers 2
QUANTIZATION = {
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "quantization": "wint2",
    "moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": INT4_LAYER}},
}


@dataclass
class Wint2Matrix:
    """The five tensors of a matrix with ``out`` output channels, random unless they are given."""

    packed: Array
    local_scale: Array
    super_scale: Tensor
    code_scale: Array
    code_zp: Array

    @classmethod
    def random(cls, width: int, out: int, seed: int) -> Wint2Matrix:
        draw = np.random.default_rng(seed)
        return cls(
            draw.integers(0, 256, (width // 4, out), dtype=np.uint8),
            draw.integers(0, 256, (width // 128, out), dtype=np.uint8),
            torch.from_numpy(draw.uniform(1e-4, 2e-4, out)).to(torch.bfloat16),
            draw.uniform(10, 16, out).astype(np.float32),
            draw.uniform(-900, 40, out).astype(np.float32),  # some code words are negative
        )

    def decoded(self, kernel_order: bool = False) -> Array:
        """(out, in) float64, weight by weight from the formula."""
        bytes_in, out = self.packed.shape
        weight = np.zeros((out, 4 * bytes_in))
        for n in range(out):
            for k in range(4 * bytes_in):
                product = np.float32(self.packed[k // 4, n]) * self.code_scale[n]
                code = int(np.floor(np.float32(np.float32(product + self.code_zp[n]) + np.float32(0.5))))
                six_bits = (code >> (9, 6, 3, 0)[k % 4]) & 63
                group = k // 64
                both = int(self.local_scale[group // 2, n])
                nibble = both >> 4 if group % 2 == 0 else both & 15
                weight[n, k] = (six_bits - 32) * nibble * float(self.super_scale[n])
        return in_natural_order(weight) if kernel_order else weight

    def tensors(self, module: str) -> dict[str, Tensor]:
        return {
            f"{module}.quant_weight": torch.from_numpy(self.packed),
            f"{module}.weight_scale": torch.from_numpy(self.local_scale),
            f"{module}.super_scales": self.super_scale,
            f"{module}.code_scale": torch.from_numpy(self.code_scale),
            f"{module}.code_zp": torch.from_numpy(self.code_zp),
        }


def in_natural_order(stored: Array) -> Array:
    """Undo the reordering of the kernel: (out, in) -> (out, in)."""
    natural = np.zeros_like(stored)
    for k in range(stored.shape[1]):
        place = k % 64
        a, b, c = place // 16, place % 16 // 2, place % 2
        natural[:, k - place + 8 * b + 2 * a + c] = stored[:, k]
    return natural


def for_the_gpu(values: Array, bits: int) -> Array:
    """Signed integers (out, in) -> what Paddle stores at 8 or 4 bits: (out, in) or (out / 2, in) int8.

    The steps of the preprocessor, in its order: reorder inputs, interleave rows, add the bias, reorder words.
    """
    out, width = values.shape
    lines, group = (2, 16) if bits == 8 else (4, 32)
    order = [8 * (p % (group // 4 // 2 * 2) // 2) + p % 2 for p in range(group // 4)]
    source = [order[p] + 2 * step for step in range(4) for p in range(group // 4)]
    permuted = np.stack([values[:, k - k % group + source[k % group]] for k in range(width)], axis=1)
    stream = []
    for first in range(0, out, lines):
        for block in range(0, width, 64):
            for line in range(lines):
                stream += list(permuted[first + line, block : block + 64] + 2 ** (bits - 1))
    word = 32 // bits
    words = np.array(stream).reshape(-1, word)
    words = np.concatenate([words[:, 0::2], words[:, 1::2]], axis=1)  # even elements, then odd ones
    stored: Array
    if bits == 8:
        stored = words.astype(np.uint8).view(np.int8).reshape(out, width)
    else:
        pairs = words.reshape(-1, 2)
        stored = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).view(np.int8).reshape(out // 2, width)
    return stored


class Wint2Files:
    """A tiny model in FastDeploy's layout.

    Attributes:
        stored: tensors by Paddle's names; change them to damage the checkpoint.
        meant: the ordinary checkpoint that they stand for, decoded matrices in bfloat16.
        config: the object of config.json.
    """

    def __init__(self, *, kernel_order: bool = False, prefix: str = "ernie.") -> None:
        made = _made(kernel_order)
        self.stored = {
            name.replace("ernie.", prefix, 1): tensor.contiguous().clone()
            for name, tensor in made.stored.items()
        }
        self.meant = dict(made.meant)
        self.config: dict[str, Any] = tiny_config(OPTIONS) | {"quantization_config": QUANTIZATION}

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        write_tensors(directory, {name: tensor.contiguous() for name, tensor in self.stored.items()}, shards=2)
        write_tokenizer(directory, OPTIONS.vocabulary)
        return directory


@lru_cache(maxsize=2)
def _made(kernel_order: bool) -> _Maker:
    return _Maker(kernel_order)


class _Maker:
    """Stores a model, tensor by tensor, and notes what was stored."""

    def __init__(self, kernel_order: bool) -> None:
        self.stored: dict[str, Tensor] = {}
        self.meant = tiny_tensors(OPTIONS)
        self._kernel_order, self._seed = kernel_order, 0
        for name in list(self.meant):
            self._store(name)
        self._let_norms_tell()

    def _store(self, name: str) -> None:
        tensor, paddle = self.meant[name], "ernie." + name.removeprefix("model.")
        stem = paddle.rpartition(".")[0]
        parent, _, part = stem.rpartition(".")
        if name == "lm_head.weight":
            self.stored[name] = tensor.T
        elif part in ("q_proj", "gate_proj"):
            others = ("q_proj", "k_proj", "v_proj") if part == "q_proj" else ("gate_proj", "up_proj")
            names = [name.replace(part, other) for other in others]
            self._quantize(f"{parent}.{'qkv_proj' if part == 'q_proj' else 'up_gate_proj'}", names)
        elif part in ("k_proj", "v_proj", "up_proj"):
            pass  # went with the first of its module
        elif part.endswith("_proj"):
            self._quantize(stem, [name])
        else:
            self.stored[paddle] = tensor.T if part == "gate" else tensor

    def _quantize(self, module: str, names: list[str]) -> None:
        self._seed += 1
        heights = [self.meant[name].shape[0] for name in names]
        out, width = sum(heights), self.meant[names[0]].shape[1]
        layer = int(module.split(".")[2])
        if ".experts." in module and layer > INT4_LAYER:
            matrix = Wint2Matrix.random(width, out, self._seed)
            self.stored |= matrix.tensors(module)
            decoded = torch.from_numpy(matrix.decoded(self._kernel_order))
        else:
            bits = 4 if ".experts." in module else 8
            draw = np.random.default_rng(self._seed)
            values = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, width))
            scale = torch.from_numpy(draw.uniform(1, 2, out) / 2**bits / 8).to(torch.bfloat16)
            self.stored[f"{module}.quant_weight"] = torch.from_numpy(for_the_gpu(values, bits))
            self.stored[f"{module}.weight_scale"] = scale
            decoded = torch.from_numpy(values).double() * scale.double()[:, None]
        for name, part in zip(names, decoded.split(heights), strict=True):
            self.meant[name] = part.to(torch.bfloat16)

    def _let_norms_tell(self) -> None:
        """As in a trained model, norms and columns go together."""
        for layer in range(INT4_LAYER + 1, OPTIONS.layers):
            gates = [self.meant[f"model.layers.{layer}.mlp.experts.{e}.gate_proj.weight"] for e in range(4)]
            norm = torch.stack(gates).double().square().mean(dim=(0, 1)).sqrt()
            norm = (norm / norm.mean()).to(torch.bfloat16)
            self.meant[f"model.layers.{layer}.post_attention_layernorm.weight"] = norm
            self.stored[f"ernie.layers.{layer}.post_attention_layernorm.weight"] = norm
