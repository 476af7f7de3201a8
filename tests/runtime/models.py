"""Small packed models of random bytes: as the CPU runs them, and with the words that GPU kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ernieq.decode import TrellisExperts, TrellisWeight
from ernieq.load import load_model
from ernieq.model import ErnieForCausalLM, ModelConfig, expected_parameters
from ernieq.pack import Manifest, PackedWriter, Source
from tests.decode.encoded_matrices import random_matrix, random_signs
from tests.load.packed_model import EVERYTHING, as_raw, plain_tensor, raw_config

SMALL = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # the least that the GPU's attention takes
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=48,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=2,
)
DENSE = dataclasses.replace(SMALL, model_type="ernie4_5", moe_num_experts=0, moe_num_shared_experts=0)
UNTIED_BIAS = dataclasses.replace(SMALL, tie_word_embeddings=False, use_bias=True)
NO_SHARED = dataclasses.replace(SMALL, moe_num_shared_experts=0)

Bits = Callable[[str], float]


def recipe_bits(name: str) -> float:
    """As recipes give bits: by part."""
    if ".experts." in name:
        return 2
    return 3 if name.startswith("model.layers") else 5


def mixed_bits(name: str) -> float:
    """Other bits for v than for q and k, and for up than for gate, outside the routed experts."""
    if ".experts." in name:
        return 4 if "down" in name else 3
    return 4 if "v_proj" in name or "up_proj" in name else 2


def bits_of_layers(name: str) -> float:
    """Half bits, other ones in every layer and for every part of it; q, k and v differ in some."""
    if not name.startswith("model.layers"):
        return 8
    layer = int(name.split(".")[2])
    if ".experts." in name:
        return (2, 3.5, 1.5)[layer] if "down" in name else (2, 1.5, 2.5)[layer]
    if "k_proj" in name or "v_proj" in name:
        return (3.5, 4.5, 2.5)[layer]
    return (3.5, 2.5, 8)[layer] if "q_proj" in name or "down" in name else (7, 3, 5.5)[layer]


def input_of(name: str) -> str:
    """Matrices that read one input share its signs."""
    for ending, group in (
        ("gate_proj", "mlp"),
        ("up_proj", "mlp"),
        ("q_proj", "a"),
        ("k_proj", "a"),
        ("v_proj", "a"),
    ):
        if ending in name:
            return f"{name.split('.')[2]} {group}"
    return name.split(".experts.")[0] if ".experts." in name else name


def write_packed(
    target: Path, config: ModelConfig, bits: Bits = recipe_bits, *, one_rotation: bool = True
) -> Path:
    """Write a packed checkpoint of random bytes whose rotations are as the encoder makes them."""
    with PackedWriter(target) as writer:
        for name, spec in expected_parameters(config).items():
            if spec.role in EVERYTHING:
                rows, columns = spec.shape
                group = input_of(name) if one_rotation else name
                signs = random_signs(columns, sum(group.encode()))
                seed = sum((place + 1) * byte for place, byte in enumerate(name.encode()))
                matrix = random_matrix(rows, columns, bits(name), signs=signs, seed=seed)
                writer.add_encoded(name.removesuffix(".weight"), matrix)
            else:
                writer.add_tensor(name, as_raw(plain_tensor(name, spec)))
        writer.finish(raw_config(config), Manifest("0.1.0", Source("org/base"), {}, seed=0))
    return target


def with_words(model: ErnieForCausalLM) -> ErnieForCausalLM:
    """Give a model on the CPU the tensors that a move to a GPU would give it there."""
    here = torch.device("cpu")
    parts: list[Any] = list(model.modules())
    for part in parts:
        if isinstance(part, TrellisExperts):
            part.move(here)
    for part in parts:
        if isinstance(part, TrellisWeight) and not part.on_gpu:
            part.move(here)
    return model


def model_pair(path: Path) -> tuple[ErnieForCausalLM, ErnieForCausalLM]:
    """The ordinary model on the CPU, and the same with words."""
    return load_model(path, threads=1), with_words(load_model(path, threads=1))


def tokens(count: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL.vocab_size, (batch, count), generator=generator)
