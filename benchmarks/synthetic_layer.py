"""A random MoE layer and random hidden states, with what makes real ones hard to quantize.

Rows of weights differ in size, a few of their channels have heavy tails; inputs are correlated and have some
very large channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ernieq.calibrate import Streams, stream_dtype
from ernieq.checkpoint import Checkpoint, open_checkpoint

LAYER = 1  # the first of the 21B model's layers that has experts


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer; the defaults are those of ERNIE-4.5-21B-A3B."""

    experts: int = 64
    hidden: int = 2560
    expert_width: int = 1536
    heads: int = 20
    kv_heads: int = 4
    head_dim: int = 128

    def config(self) -> dict[str, Any]:
        """The object of config.json, of a model of two layers."""
        return {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "hidden_act": "silu",
            "vocab_size": 103424,
            "hidden_size": self.hidden,
            "intermediate_size": 12288,
            "num_hidden_layers": 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "use_bias": False,
            "moe_num_experts": self.experts,
            "moe_k": min(6, self.experts),
            "moe_intermediate_size": self.expert_width,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        }


def write_layer(directory: Path, shape: Shape, device: torch.device) -> Checkpoint:
    """Write one layer as a bf16 shard; the rest of the model is never read."""
    draw = torch.Generator(device).manual_seed(0)
    prefix, tensors = f"model.layers.{LAYER}.", dict[str, Tensor]()

    def matrix(name: str, rows: int, columns: int) -> None:
        weight = torch.randn(rows, columns, generator=draw, device=device) / columns**0.5
        weight *= (0.3 * torch.randn(rows, 1, generator=draw, device=device)).exp()
        heavy = torch.rand(columns, generator=draw, device=device) < 0.01
        tails = torch.rand(columns, generator=draw, device=device).clamp(min=1e-3) ** -0.5  # Pareto
        weight *= torch.where(heavy, 1 + tails, 1.0)
        tensors[f"{prefix}{name}.weight"] = weight.bfloat16().cpu()

    def mlp(path: str, width: int) -> None:
        matrix(f"{path}.gate_proj", width, shape.hidden)
        matrix(f"{path}.up_proj", width, shape.hidden)
        matrix(f"{path}.down_proj", shape.hidden, width)

    keys = shape.kv_heads * shape.head_dim
    for name, rows in (("q", shape.heads * shape.head_dim), ("k", keys), ("v", keys)):
        matrix(f"self_attn.{name}_proj", rows, shape.hidden)
    matrix("self_attn.o_proj", shape.hidden, shape.heads * shape.head_dim)
    for expert in range(shape.experts):
        mlp(f"mlp.experts.{expert}", shape.expert_width)
    mlp("mlp.shared_experts", 2 * shape.expert_width)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    router = torch.randn(shape.experts, shape.hidden, generator=draw, device=device) / shape.hidden**0.5
    tensors[f"{prefix}mlp.gate.weight"] = router.cpu()
    tensors[f"{prefix}mlp.moe_statics.e_score_correction_bias"] = torch.zeros(1, shape.experts)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return open_checkpoint(directory)


def hidden_states(shape: Shape, windows: int, length: int, device: torch.device) -> Streams:
    """Two streams in the processor's memory, the second a little off, as behind quantized layers."""
    draw = torch.Generator(device).manual_seed(1)
    width, dtype = shape.hidden, stream_dtype(windows * length, shape.hidden)
    mixing = torch.randn(width, width, generator=draw, device=device) / width**0.5
    mixing *= torch.linspace(0, -3, width, device=device).exp()[:, None]  # a falling spectrum
    channels = (0.5 * torch.randn(width, generator=draw, device=device)).exp()
    channels[torch.randperm(width, generator=draw, device=device)[:4]] *= 50
    both = [torch.empty(windows, length, width, dtype=dtype) for _ in "rq"]
    for window in range(windows):
        states = torch.randn(length, width, generator=draw, device=device) @ mixing * channels
        error = torch.randn(length, width, generator=draw, device=device) @ mixing * channels
        both[0][window], both[1][window] = states.to(dtype).cpu(), (states + 0.1 * error).to(dtype).cpu()
    return Streams(both[0], both[1])
