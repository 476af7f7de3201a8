"""The layer stream against the whole model, and its sizes against the files."""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ernieq.errors import MissingTensorError
from ernieq.load import ModelStream, load_model, open_stream
from ernieq.model import expected_parameters
from tests.load.packed_model import EVERYTHING, MOE, by_role, write_model

TOKENS = torch.tensor([[1, 20, 3, 17], [5, 6, 31, 8]])


def logits(stream: ModelStream) -> Tensor:
    with torch.inference_mode():
        hidden = stream.embed(TOKENS)
        rotary = stream.rotary.angles(torch.arange(TOKENS.shape[1]))
        for layer in stream.layers():
            hidden = layer(hidden, rotary)
        return stream.head(hidden.flatten(0, 1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_stream_computes_what_the_whole_model_does(tied: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(MOE, tie_word_embeddings=tied)
    write_model(tmp_path / "packed", config, by_role(EVERYTHING))
    stream = open_stream(tmp_path / "packed", threads=1)
    with torch.inference_mode():
        expected = load_model(tmp_path / "packed", threads=1)(TOKENS).flatten(0, 1)
    assert torch.equal(logits(stream), expected)
    assert torch.equal(logits(stream), expected)  # a stream can be read again
    assert stream.base == "org/base"
    assert stream.tokenizer_directory == tmp_path / "packed"


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_stream_computes_what_the_whole_model_does(tied: bool, tiny: Any) -> None:
    directory = tiny(tied=tied)
    with torch.inference_mode():
        expected = load_model(directory)(TOKENS).flatten(0, 1)
    stream = open_stream(directory)
    assert torch.equal(logits(stream), expected)
    assert stream.base is None


def test_a_narrow_stream_computes_what_the_whole_model_does_in_bfloat16(tiny: Any) -> None:
    directory = tiny()
    with torch.inference_mode():
        expected = load_model(directory, dtype=torch.bfloat16)(TOKENS).flatten(0, 1)
    found = logits(open_stream(directory, dtype=torch.bfloat16))
    assert torch.equal(found, expected.float())
    assert not torch.equal(found, logits(open_stream(directory)))


def test_a_layer_is_let_go_when_the_next_is_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    layers = open_stream(tmp_path / "packed").layers()
    first = next(layers)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert next(layers).is_moe


def test_sizes_add_up_to_the_file(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    sizes = open_stream(tmp_path / "packed").weight_bytes()
    expected = expected_parameters(MOE)
    assert sizes["total"] == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert sizes["quantized"] < sizes["total"]
    assert sizes["parameters"] == sum(torch.Size(spec.shape).numel() for spec in expected.values())
    kept = sum(
        torch.Size(spec.shape).numel()
        for name, spec in expected.items()
        if "norm" in name or "mlp.gate." in name or "moe_statics" in name
    )
    assert sizes["quantized_parameters"] == sizes["parameters"] - kept
    assert 2 < 8 * sizes["quantized"] / sizes["quantized_parameters"] < 7


def test_the_size_of_the_decoder_is_that_of_its_layers(tiny: Any) -> None:
    stream = open_stream(tiny(mtp=True))
    names = [name for name in expected_parameters(stream.config) if name.startswith("model.layers.")]
    specs = expected_parameters(stream.config)
    float32 = ("mlp.gate.weight", "e_score_correction_bias")
    assert stream.weight_bytes()["decoder"] == sum(
        torch.Size(specs[name].shape).numel() * (4 if name.endswith(float32) else 2) for name in names
    )


def test_a_stream_with_a_missing_tensor_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING), leave_out=name)
    with pytest.raises(MissingTensorError, match=name):
        open_stream(tmp_path / "packed")
