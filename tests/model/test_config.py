"""config.json as it is found in the wild, and as it must not be."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from ernieq.errors import CheckpointError, UnsupportedModelError
from ernieq.model import ModelConfig
from tests.tiny import TinyOptions, tiny_config

# As published for the 21B: keys that this project does not read included.
ERNIE_21B: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_ernie4_5_moe.Ernie4_5_MoeConfig"},
    "model_type": "ernie4_5_moe",
    "torch_dtype": "bfloat16",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "use_bias": False,
    "vocab_size": 103424,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk",
    "moe_use_aux_free": True,
    "num_nextn_predict_layers": 1,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(TinyOptions(config=changes)))


def test_the_21b_configuration_is_read_with_its_gaps() -> None:
    config = ModelConfig.from_dict(ERNIE_21B)
    assert config.head_dim == 128
    assert config.moe_norm_min == 1e-12
    assert [index for index in range(28) if config.is_moe_layer(index)] == list(range(1, 28))
    assert (config.rope_theta, config.eos_token_id, config.eos_token_ids) == (500000.0, 2, (2,))


@pytest.mark.parametrize("moe", [True, False])
def test_absent_keys_mean_what_transformers_takes_them_for(moe: bool) -> None:
    sizes = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    raw = {
        key: value
        for key, value in tiny_config(TinyOptions(moe=moe)).items()
        if key in sizes | {"architectures", "model_type"}
    }
    if moe:
        raw["moe_num_experts"] = 8
    ours, theirs = ModelConfig.from_dict(raw), AutoConfig.for_model(**raw)
    shared = [
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "use_bias",
    ]
    shared += ["bos_token_id", "eos_token_id", "pad_token_id", "hidden_act"]
    experts = ["moe_k", "moe_intermediate_size", "moe_num_shared_experts", "moe_layer_start_index"]
    experts += ["moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "moe_num_experts"]
    names = shared + (experts if moe else ["head_dim"])
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"moe_num_experts": [8, 8]}, "moe_num_experts", 8),
        ({"moe_k": [2]}, "moe_k", 2),
        ({"moe_intermediate_size": [16, 16, 16]}, "moe_intermediate_size", 16),
        ({"hidden_size": 32.0}, "hidden_size", 32),
        ({"head_dim": None}, "head_dim", 8),
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"moe_norm_min": None}, "moe_norm_min", 1e-12),
        ({"moe_layer_end_index": -1}, "moe_layer_end_index", 2),
        ({"moe_num_experts": ..., "num_experts": 4}, "moe_num_experts", 4),
        ({"rope_scaling": None}, "rope_theta", 500000.0),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta", 5.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 9}, "rope_theta", 9.0),
        ({"eos_token_id": [2, 5]}, "eos_token_ids", (2, 5)),
        ({"eos_token_id": None}, "eos_token_id", None),
        ({"pad_token_id": -1}, "pad_token_id", None),
        ({"model_type": ...}, "model_type", "ernie4_5_moe"),
        ({"architectures": None}, "model_type", "ernie4_5_moe"),
        ({"moe_num_shared_experts": 0}, "moe_num_shared_experts", 0),
    ],
)
def test_variants_in_the_wild_are_read(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(read(**changes), field) == value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "describes the architecture 'LlamaForCausalLM'",
        ),
        (
            {"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]},
            "'Ernie4_5_VLMoeForConditionalGeneration'",
        ),
        ({"architectures": ["Ernie4_5ForCausalLM"]}, "'Ernie4_5ForCausalLM' .model_type 'ernie4_5_moe'."),
        ({"architectures": ..., "model_type": ...}, "architecture None"),
        ({"architectures": ..., "model_type": ["x"]}, "architecture .'x'."),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; ernieq implements 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling asks for type 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters asks for type 'linear'"),
        ({"moe_intermediate_size": [1536, 512]}, r"moe_intermediate_size is \[1536, 512\]"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; a whole number from 1 to 1024"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; a multiple of num_key_value_heads, 3"),
        ({"head_dim": 15}, "head_dim is 15; an even number"),
        ({"moe_k": 5}, "moe_k is 5; with 4 experts 1 to 4 is allowed"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a token id"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read(**changes)
