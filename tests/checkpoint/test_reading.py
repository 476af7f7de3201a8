"""Good checkpoints: single or sharded, every stored dtype, parts of the model one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernieq.checkpoint import (
    TensorInfo,
    load_embedding,
    load_final_norm,
    load_head,
    load_layer,
    load_tokenizer,
    open_checkpoint,
)
from ernieq.errors import CheckpointError, MissingTensorError, UsageError
from ernieq.model import Rotary
from tests.model.models import our_model, tokens_for
from tests.tiny import TinyOptions, tiny_tensors

TinyFactory = Callable[..., Path]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tensor_is_read_as_it_was_written(tiny: TinyFactory, shards: int, dtype: torch.dtype) -> None:
    options = TinyOptions(mtp=True, dtype=dtype)
    checkpoint = open_checkpoint(tiny(mtp=True, dtype=dtype, shards=shards))
    written = tiny_tensors(options)
    assert checkpoint.names() == sorted(written)
    assert len(checkpoint.shard_files()) == shards
    for name, tensor in written.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert torch.equal(checkpoint.read(name, torch.float64), tensor.double())
        assert bytes(checkpoint.read_bytes(name)) == tensor.view(torch.uint8).numpy().tobytes()


def test_info_tells_what_the_header_says(tiny: TinyFactory) -> None:
    directory = tiny()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    wanted = TensorInfo(name, "BF16", (16, 32), directory / "model.safetensors", 16 * 32 * 2)
    assert open_checkpoint(directory).info(name) == wanted


def test_all_safetensors_dtypes_are_carried_byte_by_byte(tiny: TinyFactory) -> None:
    directory = tiny()
    tensors = load_file(directory / "model.safetensors")
    dtypes = [
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.int64,
        torch.float64,
        torch.float8_e4m3fn,
        torch.uint16,
    ]
    extra = {f"extra.{dtype}": torch.tensor([[1, 0, 1]]).to(dtype) for dtype in dtypes}
    extra |= {"extra.empty": torch.empty(0, 4), "extra.scalar": torch.tensor(3.0)}
    save_file(tensors | extra, directory / "model.safetensors")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.audit().unknown == tuple(sorted(extra))
    for name, tensor in extra.items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert bytes(checkpoint.read_bytes(name)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_at_an_odd_offset_is_read(tiny: TinyFactory) -> None:
    directory = tiny()
    path = directory / "model.safetensors"
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    data = bytes([7]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert open_checkpoint(directory).read("b").tolist() == [1.5, -2.0]


def test_a_tensor_outlives_the_release_of_its_mapping(tiny: TinyFactory) -> None:
    checkpoint = open_checkpoint(tiny())
    name = "model.layers.0.mlp.up_proj.weight"
    tensor, view = checkpoint.read(name), checkpoint.read_bytes(name)
    before = tensor.clone()
    checkpoint.close()
    assert torch.equal(tensor, before)
    assert torch.equal(checkpoint.read(name), before)
    assert bytes(view) == before.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [True, False])
def test_the_parts_loaded_one_by_one_compute_what_the_model_does(
    tiny: TinyFactory, moe: bool, tied: bool
) -> None:
    directory = tiny(moe=moe, tied=tied, use_bias=True, shards=2)
    checkpoint, model = open_checkpoint(directory), our_model(directory)
    token_ids = tokens_for(model, 2, 9)
    with torch.inference_mode():
        hidden = load_embedding(checkpoint)(token_ids)
        rotary = Rotary(checkpoint.config).angles(torch.arange(9))
        for index in range(checkpoint.config.num_hidden_layers):
            hidden = load_layer(checkpoint, index)(hidden, rotary)
        logits = load_head(checkpoint)(load_final_norm(checkpoint)(hidden))
        assert torch.equal(logits, model(token_ids))


def test_a_loaded_layer_keeps_a_float32_router(tiny: TinyFactory) -> None:
    layer = load_layer(open_checkpoint(tiny()), 1, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert dtypes.pop("mlp.gate.weight") == torch.float32
    assert dtypes.pop("mlp.moe_statics.e_score_correction_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_mtp_tensors_and_a_stored_tied_head_are_reported_as_unknown(tiny: TinyFactory) -> None:
    directory = tiny(mtp=True)
    path = directory / "model.safetensors"
    tensors = load_file(path) | {"lm_head.weight": torch.ones(64, 32)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path)
    checkpoint = open_checkpoint(directory)
    audit = checkpoint.audit()
    assert audit.unknown == (
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.mtp_block.0.self_attn.q_proj.weight",
        "model.mtp_emb_norm.0.weight",
        "model.mtp_linear_proj.0.weight",
    )
    assert sorted(audit.present + audit.unknown) == checkpoint.names()
    assert torch.equal(load_head(checkpoint).weight, load_embedding(checkpoint).weight)


def test_auxiliary_files_are_tokenizer_and_generation_settings_only(tiny: TinyFactory) -> None:
    directory = tiny(shards=2)
    for name in (
        "README.md",
        "training.json",
        "tokenizer.model",
        "chat_template.jinja",
        "special_tokens_map.json",
    ):
        (directory / name).write_text("{}")
    (directory / "tokenizer_folder").mkdir()
    assert [path.name for path in open_checkpoint(directory).aux_files()] == [
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_a_link_to_the_weights_is_followed(tiny: TinyFactory) -> None:
    """The hub's cache is made of links."""
    directory = tiny()
    snapshot, blobs = directory.parent / "snapshots" / "revision", directory.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.audit().missing == ()
    assert {path.name for path in checkpoint.aux_files()} >= {"tokenizer.json", "generation_config.json"}


def test_the_tokenizer_of_a_checkpoint_is_loaded(tiny: TinyFactory) -> None:
    assert load_tokenizer(tiny()).encode("w5 w9", add_special_tokens=False) == [5, 9]


def test_a_missing_or_broken_tokenizer_is_named(tiny: TinyFactory) -> None:
    directory = tiny()
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"the tokenizer of {directory} can't be read: "):
        load_tokenizer(directory)
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"{directory} holds no tokenizer; tokenizer.json or"):
        load_tokenizer(directory)


def test_a_name_that_is_not_there_is_named(tiny: TinyFactory) -> None:
    checkpoint = open_checkpoint(tiny())
    for look in (checkpoint.info, checkpoint.read, checkpoint.read_bytes):
        with pytest.raises(MissingTensorError, match=f"{checkpoint.directory} has no tensor model.nothing"):
            look("model.nothing")


def test_a_revision_of_a_local_directory_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(UsageError, match="the revision main is of no use"):
        open_checkpoint(tiny(), revision="main")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see this process's mappings")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_mapping_is_left_behind_a_loaded_part(tiny: TinyFactory, dtype: torch.dtype) -> None:
    """Parts own their memory, so writing to them is safe and conversion memory does not grow with depth."""
    directory = tiny(shards=2, dtype=dtype)
    checkpoint = open_checkpoint(directory)

    def mapped() -> bool:
        return str(directory) in Path("/proc/self/maps").read_text()

    tensor = checkpoint.read("model.norm.weight")
    assert mapped()
    del tensor
    parts: list[torch.nn.Module] = [load_layer(checkpoint, 1, dtype), load_embedding(checkpoint, dtype)]
    parts += [load_final_norm(checkpoint, dtype), load_head(checkpoint, dtype)]
    assert not mapped()
    for part in parts:
        for parameter in part.parameters():
            parameter.zero_()
