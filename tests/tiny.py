"""Writes small random ERNIE 4.5 checkpoints, so that tests need no download and every option can be met.

The names, shapes and stored dtypes are written out here a second time, on purpose: a test that compared the
reader with the reader's own list of tensors could not fail.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class TinyOptions:
    """What to write; the defaults give a MoE model of three layers, the first dense, with shared experts.

    ``config`` changes or adds keys of config.json as they are written (a value of ``...`` removes the key).
    """

    moe: bool = True
    tied: bool = True
    use_bias: bool = False
    shared_experts: int = 2
    interval: int = 1
    start: int = 1
    end: int = -1
    layers: int = 3
    experts: int = 4
    chosen: int = 2
    hidden: int = 32
    intermediate: int = 48
    expert_width: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocabulary: int = 64
    dtype: torch.dtype = torch.bfloat16
    router_bias: float = 0.2  # standard deviation; a softmax over 4 experts is about 0.25 each
    mtp: bool = False
    shards: int = 1
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)


def tiny_config(options: TinyOptions) -> dict[str, Any]:
    """The object of config.json."""
    raw: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM" if options.moe else "Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5_moe" if options.moe else "ernie4_5",
        "dtype": str(options.dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "head_dim": options.head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": options.tied,
        "use_bias": options.use_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "vocab_size": options.vocabulary,
    }
    if options.moe:
        raw |= {
            "moe_num_experts": options.experts,
            "moe_k": options.chosen,
            "moe_intermediate_size": options.expert_width,
            "moe_num_shared_experts": options.shared_experts,
            "moe_layer_start_index": options.start,
            "moe_layer_end_index": options.end,
            "moe_layer_interval": options.interval,
            "moe_norm_min": 1e-12,
        }
    raw |= options.config
    return {key: value for key, value in raw.items() if value is not ...}


def tiny_tensors(options: TinyOptions) -> dict[str, Tensor]:
    """All tensors by name, drawn so that activations neither vanish nor explode."""
    draw = _Draw(options)
    draw.matrix("model.embed_tokens.weight", options.vocabulary, options.hidden)
    for index in range(options.layers):
        _layer(draw, options, index)
    draw.norm("model.norm.weight")
    if not options.tied:
        draw.matrix("lm_head.weight", options.vocabulary, options.hidden)
    if options.moe and options.use_bias:
        draw.vector("lm_head.bias", options.vocabulary)
    if options.mtp:
        draw.matrix("model.mtp_linear_proj.0.weight", options.hidden, 2 * options.hidden)
        draw.norm("model.mtp_emb_norm.0.weight")
        draw.linear("model.mtp_block.0.self_attn.q_proj", options.hidden, options.hidden, bias=False)
    return draw.tensors


def write_tiny(directory: Path, options: TinyOptions | None = None, **changes: Any) -> Path:
    """Write a checkpoint and return its directory.

    Args:
        directory: created if need be.
        options: what to write.
        changes: options by name, if ``options`` is not given.
    """
    options = options or TinyOptions(**changes)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(tiny_config(options), indent=1))
    write_tensors(directory, tiny_tensors(options), shards=options.shards)
    write_tokenizer(directory, options.vocabulary)
    return directory


def write_tensors(directory: Path, tensors: dict[str, Tensor], *, shards: int = 1) -> None:
    """Write one file, or several with an index; tensors are dealt out in turn."""
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata)
        return
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    weight_map = {name: files[place % shards] for place, name in enumerate(tensors)}
    for file in files:
        chosen = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(chosen, directory / file, metadata)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer whose tokens are the words ``w3``, ``w4``, ..., after ``<unk>``, ``<s>`` and ``</s>``."""
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"w{number}" for number in range(len(special), vocabulary)]
    added = [
        {
            "id": number,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, word in enumerate(special)
    ]
    table = {word: number for number, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": table, "unk_token": "<unk>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
    }
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content))


class _Draw:
    """Collects random tensors, all from one seeded generator."""

    def __init__(self, options: TinyOptions) -> None:
        self._options = options
        self._generator = torch.Generator().manual_seed(options.seed)
        self.tensors: dict[str, Tensor] = {}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def matrix(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> None:
        weight = self._normal(rows, columns) / columns**0.5
        self.tensors[name] = weight.to(dtype or self._options.dtype)

    def vector(self, name: str, width: int, scale: float = 0.2) -> None:
        self.tensors[name] = (scale * self._normal(width)).to(self._options.dtype)

    def norm(self, name: str) -> None:
        self.tensors[name] = (1 + 0.2 * self._normal(self._options.hidden)).to(self._options.dtype)

    def linear(self, name: str, rows: int, columns: int, *, bias: bool) -> None:
        self.matrix(f"{name}.weight", rows, columns)
        if bias:
            self.vector(f"{name}.bias", rows)

    def mlp(self, prefix: str, width: int, *, bias: bool) -> None:
        hidden = self._options.hidden
        self.linear(f"{prefix}gate_proj", width, hidden, bias=bias)
        self.linear(f"{prefix}up_proj", width, hidden, bias=bias)
        self.linear(f"{prefix}down_proj", hidden, width, bias=bias)

    def router(self, prefix: str) -> None:
        experts, hidden = self._options.experts, self._options.hidden
        self.matrix(f"{prefix}gate.weight", experts, hidden, torch.float32)
        bias = self._options.router_bias * self._normal(1, experts)
        self.tensors[f"{prefix}moe_statics.e_score_correction_bias"] = bias


def _layer(draw: _Draw, options: TinyOptions, index: int) -> None:
    prefix, bias = f"model.layers.{index}.", options.use_bias
    draw.norm(f"{prefix}input_layernorm.weight")
    draw.norm(f"{prefix}post_attention_layernorm.weight")
    queries, keys = options.heads * options.head_dim, options.kv_heads * options.head_dim
    draw.linear(f"{prefix}self_attn.q_proj", queries, options.hidden, bias=bias)
    draw.linear(f"{prefix}self_attn.k_proj", keys, options.hidden, bias=bias)
    draw.linear(f"{prefix}self_attn.v_proj", keys, options.hidden, bias=bias)
    draw.linear(f"{prefix}self_attn.o_proj", options.hidden, queries, bias=bias)
    end = options.layers - 1 if options.end == -1 else options.end
    if not (options.moe and options.start <= index <= end and (index + 1) % options.interval == 0):
        draw.mlp(f"{prefix}mlp.", options.intermediate, bias=bias)
        return
    draw.router(f"{prefix}mlp.")
    for expert in range(options.experts):
        draw.mlp(f"{prefix}mlp.experts.{expert}.", options.expert_width, bias=False)
    if options.shared_experts:
        draw.mlp(f"{prefix}mlp.shared_experts.", options.expert_width * options.shared_experts, bias=bias)
