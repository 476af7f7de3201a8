"""A packed ERNIE model of random bytes beside the transformers model whose names and shapes it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from ernieq.pack import PackedWriter, RawTensor
from ernieq.trellis import EncodedMatrix
from tests.pack.packed_factory import manifest, random_matrix

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
KEPT_MATRICES = ("mlp.gate.weight", "norm", "moe_statics")


def source_model(directory: Path) -> Path:
    """Save a tiny mixture of experts: one dense layer, two with four experts and shared ones."""
    torch.manual_seed(3)
    config = Ernie4_5_MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, moe_num_experts=4, moe_k=2, moe_intermediate_size=48,
        moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=2, tie_word_embeddings=True,
        max_position_embeddings=128,
    )  # fmt: skip
    model: Any = Ernie4_5_MoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


def block_of(width: int) -> int:
    """The largest power of two that divides a width."""
    return width & -width


def pack_model(source: Path, target: Path) -> dict[str, EncodedMatrix]:
    """Replace every matrix of the model by random tiles of 2 to 6 bits and pack it."""
    modules: dict[str, EncodedMatrix] = {}
    with PackedWriter(target, shard_bytes=30_000) as writer:
        for seed, (name, tensor) in enumerate(sorted(load_file(source / "model.safetensors").items())):
            if tensor.ndim != 2 or any(part in name for part in KEPT_MATRICES):
                stored = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(
                    name, RawTensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), stored.tobytes())
                )
                continue
            rows, columns = tensor.shape
            matrix = random_matrix(rows, columns, 2 + seed % 5, block=block_of(columns), seed=seed)
            matrix.scale[:] *= np.float16(0.05)
            modules[name.removesuffix(".weight")] = matrix
            writer.add_encoded(name.removesuffix(".weight"), matrix)
        writer.add_tensor("model.mtp_norm.0.weight", RawTensor("BF16", (2,), b"\x80\x3f" * 2), carried=True)
        writer.copy_file(source / "tokenizer.json")
        writer.finish(json.loads((source / "config.json").read_text()), manifest())
    return modules
