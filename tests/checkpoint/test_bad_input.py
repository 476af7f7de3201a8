"""Every way a checkpoint can be wrong: one sentence that names the thing, and the files untouched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernieq.checkpoint import load_embedding, load_final_norm, load_head, load_layer, open_checkpoint
from ernieq.errors import (
    CheckpointError,
    ErnieqError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedModelError,
)

TinyFactory = Callable[..., Path]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def digest(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


def fails(directory: Path, kind: type[ErnieqError], *parts: str) -> None:
    """Opening, auditing and loading everything must end in one sentence that has all the parts."""
    before = digest(directory)
    with pytest.raises(kind) as caught:
        use_everything(directory)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    assert digest(directory) == before


def use_everything(directory: Path) -> None:
    open_checkpoint(directory).audit()
    load_everything(directory)


def load_everything(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    load_embedding(checkpoint)
    for index in range(checkpoint.config.num_hidden_layers):
        load_layer(checkpoint, index)
    load_final_norm(checkpoint)
    load_head(checkpoint)


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def change_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def test_an_untouched_checkpoint_loads(tiny: TinyFactory) -> None:
    load_everything(tiny(shards=2))


@pytest.mark.parametrize(
    "name",
    [UP, "model.norm.weight", "lm_head.weight", "model.layers.2.mlp.moe_statics.e_score_correction_bias"],
)
def test_a_missing_tensor_is_named(tiny: TinyFactory, name: str) -> None:
    directory = tiny(tied=False)
    change_tensors(directory, lambda tensors: tensors.pop(name))
    fails(directory, MissingTensorError, f"{directory} lacks 1 of the ", f"the first is {name}")
    with pytest.raises(MissingTensorError, match=name):
        load_everything(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.3.input_layernorm.weight",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_an_extra_tensor_that_would_compute_is_named(tiny: TinyFactory, name: str) -> None:
    directory = tiny()
    change_tensors(directory, lambda tensors: tensors.update({name: torch.ones(32)}))
    fails(directory, UnsupportedModelError, f"{name} in {directory / WEIGHTS} has no place in the model")


def test_a_wrong_shape_is_named_with_both_shapes(tiny: TinyFactory) -> None:
    directory = tiny()
    change_tensors(directory, lambda tensors: tensors.update({UP: torch.ones(32, 16)}))
    sentence = f"{UP} in {directory / WEIGHTS} has shape (32, 16); config.json calls for (16, 32)"
    fails(directory, ShapeError, sentence)
    with pytest.raises(ShapeError, match=UP):
        load_layer(open_checkpoint(directory), 1)


def test_a_configuration_of_another_size_is_a_wrong_shape(tiny: TinyFactory) -> None:
    fails(tiny(config={"vocab_size": 80}), ShapeError, "model.embed_tokens.weight", "(64, 32)", "(80, 32)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_value_that_is_not_finite_is_named(tiny: TinyFactory, name: str, value: float) -> None:
    directory = tiny(tied=False)
    change_tensors(directory, lambda tensors: tensors[name].view(-1)[7:9].fill_(value))
    fails(directory, NonFiniteError, f"{name} in {directory / WEIGHTS} has 2 of ", "NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_weight_that_is_stored_in_another_dtype_is_named(tiny: TinyFactory, dtype: torch.dtype) -> None:
    directory = tiny()
    change_tensors(directory, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    fails(directory, CheckpointError, f"{UP} in ", "is stored as ", "must be one of BF16, F16, F32")


@pytest.mark.parametrize("kept", [0, 7, 8, 500, -1])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_truncated_shard_is_named(tiny: TinyFactory, shards: int, kept: int) -> None:
    directory = tiny(shards=shards)
    path = sorted(directory.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:kept])
    fails(directory, CheckpointError, f"{path} is truncated")


def test_a_shard_with_bytes_behind_its_end_is_named(tiny: TinyFactory) -> None:
    directory = tiny()
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"more")
    fails(directory, CheckpointError, f"{directory / WEIGHTS} has ", "no more are allowed")


def test_an_index_that_names_a_missing_file_is_described(tiny: TinyFactory) -> None:
    directory = tiny(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    fails(
        directory,
        CheckpointError,
        str(directory / INDEX),
        "in model-00002-of-00003.safetensors, but there is no",
    )


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "",
        "x\n.safetensors",
        7,
        None,
    ],
)
def test_an_index_that_leads_out_of_the_directory_is_refused(tiny: TinyFactory, file: Any) -> None:
    directory = tiny(shards=2)
    (directory.parent / "model.safetensors").write_bytes((directory / "config.json").read_bytes())
    change_index(directory, lambda index: index["weight_map"].update({UP: file}))
    fails(
        directory,
        CheckpointError,
        f"{directory / INDEX} places '{UP}' in ",
        "plain name of a .safetensors file",
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(tiny: TinyFactory, weight_map: Any) -> None:
    directory = tiny(shards=2)
    change_index(directory, lambda index: index.update(weight_map=weight_map))
    fails(directory, CheckpointError, f"{directory / INDEX} has no weight_map")


def test_an_index_that_disagrees_with_the_shards_is_described(tiny: TinyFactory) -> None:
    directory = tiny(shards=2)
    here = json.loads((directory / INDEX).read_text())["weight_map"][UP]
    other = next(path.name for path in directory.glob("*.safetensors") if path.name != here)
    change_index(directory, lambda index: index["weight_map"].update({UP: other}))
    fails(directory, CheckpointError, f"places {UP} in {other}, but it is in {here}")
    change_index(directory, lambda index: index["weight_map"].pop(UP))
    fails(directory, CheckpointError, f"{directory / INDEX} does not list {UP}, which {here} holds")
    change_index(directory, lambda index: index["weight_map"].update({UP: here, "ghost": here}))
    fails(directory, CheckpointError, f"places ghost in {here}, but no shard holds it")


def test_a_tensor_that_is_stored_twice_is_named(tiny: TinyFactory) -> None:
    directory = tiny(shards=2)
    first, second = sorted(directory.glob("*.safetensors"))
    save_file(load_file(second) | {"model.embed_tokens.weight": torch.ones(2)}, second)
    assert "model.embed_tokens.weight" in load_file(first)
    sentence = f"model.embed_tokens.weight is stored twice, in {first.name} and in {second.name}"
    fails(directory, CheckpointError, sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is corrupt: "),
        ("[]", "holds a JSON list; an object is needed"),
        ('{"model_type": "a", "model_type": "b"}', "the name 'model_type' appears twice"),
        ("[" * 200_000, "is corrupt: its JSON is nested too deep"),
    ],
)
def test_a_broken_configuration_is_described(tiny: TinyFactory, text: str, sentence: str) -> None:
    directory = tiny()
    (directory / "config.json").write_text(text)
    fails(directory, CheckpointError, str(directory / "config.json"), sentence)


def test_an_unsupported_architecture_is_named(tiny: TinyFactory) -> None:
    directory = tiny(config={"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    fails(directory, UnsupportedModelError, "the architecture 'Qwen3ForCausalLM'", "Ernie4_5_MoeForCausalLM")


def test_a_checkpoint_that_is_quantized_already_is_refused(tiny: TinyFactory) -> None:
    directory = tiny(config={"quantization_config": {"quant_method": "gptq"}})
    fails(directory, UnsupportedModelError, f"{directory} is quantized already (by 'gptq')")


def test_a_directory_without_configuration_or_weights_is_described(tiny: TinyFactory) -> None:
    directory = tiny()
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    fails(
        directory,
        CheckpointError,
        f"{directory} holds no weights",
        "pytorch_model.bin, which ernieq does not read",
    )
    (directory / "config.json").unlink()
    fails(directory, CheckpointError, f"{directory} is no checkpoint: it holds no config.json")


def test_a_path_that_is_no_directory_is_described(tiny: TinyFactory, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json is a file; the directory of a checkpoint is needed"
    ):
        open_checkpoint(tiny() / "config.json")
    with pytest.raises(CheckpointError, match="nowhere does not exist; a directory or a hub id"):
        open_checkpoint(tmp_path / "nowhere")
