"""Loaded models against plain ones with the decoded weights; what is refused; what stays packed."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernieq.decode import TrellisEmbedding, TrellisExperts, TrellisHead, TrellisLinear
from ernieq.errors import (
    BackendUnavailableError,
    CheckpointError,
    FormatError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from ernieq.kernels import Backend
from ernieq.load import load_model, open_stream
from ernieq.load.memory import model_bytes, stream_bytes
from ernieq.load.source import open_source, weight_bytes
from ernieq.model import Experts, KVCache, ModelConfig, ParameterRole, ParameterSpec
from tests.decode import fake_kernels
from tests.load.packed_model import CARRIED, DENSE, EVERYTHING, MOE, by_role, plain_model, write_model

TOKENS = torch.tensor([[1, 90, 3, 17, 17, 2, 64], [5, 6, 7, 8, 9, 10, 95]])
UNTIED = dataclasses.replace(MOE, tie_word_embeddings=False, use_bias=True)
TIED_BIAS = dataclasses.replace(MOE, use_bias=True)


def some_attention(name: str, _spec: ParameterSpec) -> bool:
    return name.endswith(("q_proj.weight", "o_proj.weight"))


def one_expert(name: str, _spec: ParameterSpec) -> bool:
    return ".experts.1." in name


CASES: list[tuple[str, ModelConfig, Any]] = [
    ("all of a MoE model", MOE, by_role(EVERYTHING)),
    ("all of an untied model with biases", UNTIED, by_role(EVERYTHING)),
    ("all of a tied model with biases", TIED_BIAS, by_role(EVERYTHING)),
    ("all of a dense model", DENSE, by_role(EVERYTHING)),
    ("only routed experts", MOE, by_role({ParameterRole.ROUTED_EXPERT})),
    ("only the embedding", MOE, by_role({ParameterRole.EMBEDDING})),
    ("only an untied head", UNTIED, by_role({ParameterRole.HEAD})),
    ("some of the attention", MOE, some_attention),
    ("one expert of several", MOE, one_expert),
]


@pytest.mark.parametrize(("config", "chosen"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_packed_model_computes_what_its_decoded_weights_do(
    config: ModelConfig, chosen: Any, tmp_path: Path
) -> None:
    expected = plain_model(config, write_model(tmp_path / "packed", config, chosen))
    model = load_model(tmp_path / "packed", threads=1)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS), expected(TOKENS), rtol=1e-4, atol=1e-4)


def test_the_reference_backend_gives_the_same_logits(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    with torch.inference_mode():
        fast = load_model(tmp_path / "packed")(TOKENS)
        slow = load_model(tmp_path / "packed", backend=Backend.REFERENCE)(TOKENS)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_quantized_parts_become_packed_modules_and_the_rest_stays_plain(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    model = load_model(tmp_path / "packed")
    layer: Any = model.model.layers[1]
    mlp = layer.mlp
    assert isinstance(mlp.experts, TrellisExperts)
    assert isinstance(mlp.shared_experts.down_proj, TrellisLinear)
    assert isinstance(model.model.embed_tokens, TrellisEmbedding)
    assert isinstance(model.lm_head, TrellisHead)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5 * 64 + 4 * 64 + 4  # norms and router


def test_experts_of_which_one_is_not_packed_keep_the_model_s_own_loop(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, one_expert)
    layer: Any = load_model(tmp_path / "packed").model.layers[1]
    mlp = layer.mlp
    assert isinstance(mlp.experts, Experts)
    assert isinstance(mlp.experts[1].up_proj, TrellisLinear)


def test_packed_tiles_are_views_of_the_file(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    model = load_model(tmp_path / "packed")
    mapped = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in mapped
        if line.endswith(str(tmp_path / "packed" / "model.safetensors"))
    ]
    for name, buffer in model.named_buffers():
        if name.endswith((".packed", ".scale")):
            assert any(start <= buffer.data_ptr() < end for start, end in ranges), name


def test_kept_weights_can_be_written_without_touching_the_file(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role({ParameterRole.ATTENTION}))
    before = (tmp_path / "packed" / "model.safetensors").read_bytes()
    model = load_model(tmp_path / "packed")
    for parameter in model.parameters():
        parameter.zero_()  # a view of a read-only map would end the process here
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == before


def test_a_lower_dtype_is_that_of_the_kept_weights_and_states_but_not_of_the_router(tmp_path: Path) -> None:
    expected = plain_model(MOE, write_model(tmp_path / "packed", MOE, by_role(EVERYTHING)))
    model = load_model(tmp_path / "packed", dtype=torch.bfloat16)
    layer: Any = model.model.layers[1]
    assert layer.mlp.gate.weight.dtype is torch.float32
    assert model.model.norm.weight.dtype is torch.bfloat16
    with torch.inference_mode():
        found, truth = model(TOKENS), expected(TOKENS)
    assert found.dtype is torch.float32
    assert float((found - truth).norm() / truth.norm()) < 0.1


def test_tokens_one_by_one_with_a_cache_equal_all_at_once(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    model = load_model(tmp_path / "packed")
    cache = KVCache(model.config, batch=2, max_tokens=7)
    with torch.inference_mode():
        steps = torch.cat([model(TOKENS[:, place : place + 1], cache) for place in range(7)], dim=1)
        torch.testing.assert_close(steps, model(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_plain_directory_loads_as_it_is(tiny: Any) -> None:
    directory = tiny(mtp=True, tied=False)
    model = load_model(directory)
    assert not any(isinstance(module, TrellisLinear) for module in model.modules())
    with torch.inference_mode():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_no_parameter_of_a_loaded_model_is_trainable(tiny: Any) -> None:
    assert not any(parameter.requires_grad for parameter in load_model(tiny()).parameters())


def test_a_forgotten_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING), leave_out=name)
    with pytest.raises(MissingTensorError, match=name):
        load_model(tmp_path / "packed")


def test_a_forgotten_matrix_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING), leave_out=name)
    with pytest.raises(MissingTensorError, match=name):
        load_model(tmp_path / "packed")


def test_a_tensor_that_the_model_has_no_use_for_is_refused_unless_it_is_carried(tmp_path: Path) -> None:
    extra = {"model.layers.7.self_attn.q_proj.weight": torch.ones(2)}
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING), extra=extra)
    with pytest.raises(FormatError, match=r"model\.layers\.7.* does not list it as carried") as caught:
        load_model(tmp_path / "packed")
    assert CARRIED not in str(caught.value)


def test_a_quantized_router_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(MOE, moe_num_experts=16)
    write_model(tmp_path / "packed", config, by_role({ParameterRole.ROUTER}))
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.gate is quantized, but a router never may be"):
        load_model(tmp_path / "packed")


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    config = tmp_path / "packed" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 96', '"vocab_size": 112'))
    with pytest.raises(ShapeError, match=r"embed_tokens is a packed matrix of \(96, 64\).*\(112, 64\)"):
        load_model(tmp_path / "packed")


def test_a_kept_weight_that_is_nan_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    shard = tmp_path / "packed" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    bias = load_model(tmp_path / "packed").state_dict()["model.norm.weight"].bfloat16()
    place = content.index(bias.view(torch.uint8).numpy().tobytes())
    content[place : place + 2] = np.array([0x7FC0], "<u2").tobytes()
    shard.write_bytes(content)
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        load_model(tmp_path / "packed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_sentence(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", DENSE, by_role(EVERYTHING))
    for call in (load_model, open_stream):
        with pytest.raises(BackendUnavailableError, match="device cuda can't be used"):
            call(tmp_path / "packed", device="cuda")
        with pytest.raises(UsageError, match="allowed are auto, cpu, cuda"):
            call(tmp_path / "packed", device="tpu")


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_for_which_a_gpu_has_too_little_memory_is_refused_before_it_is_read(
    packed: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        write_model(tmp_path / "model", MOE, by_role(EVERYTHING))
    directory = tmp_path / "model" if packed else tiny()
    gpu, asked = torch.device("cuda", 0), []

    def refuse(device: torch.device, needed: int, purpose: str) -> None:
        asked.append((device, purpose))
        raise BackendUnavailableError(f"{purpose} needs {needed} bytes")

    monkeypatch.setattr("ernieq.load.place.resolve_device", lambda _name: gpu)
    monkeypatch.setattr("ernieq.load.whole.require_memory", refuse)
    monkeypatch.setattr("ernieq.load.stream.require_memory", refuse)
    for call in (load_model, open_stream):
        with pytest.raises(BackendUnavailableError, match=r"needs .* bytes"):
            call(directory, device="cuda")
    with pytest.raises(UsageError, match="backend reference is one of the CPU's, but the device is cuda:0"):
        load_model(directory, device="cuda", backend=Backend.REFERENCE)
    assert [device for device, _ in asked] == [gpu, gpu]


def test_the_memory_of_a_model_is_that_of_its_weights_and_room_to_work(tmp_path: Path) -> None:
    write_model(tmp_path / "model", MOE, by_role(EVERYTHING))
    source = open_source(tmp_path / "model")
    more = model_bytes(source, torch.float32) - model_bytes(source, torch.bfloat16)
    assert more == 2 * 5 * 64  # the norms; the router is float32 always
    sizes = weight_bytes(source)
    room = model_bytes(source, torch.float32) - sizes["quantized"]
    assert 0 < stream_bytes(source, torch.float32) - room < sizes["quantized"]


@pytest.mark.parametrize(("config", "chosen"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_model_held_as_on_a_gpu_computes_the_same(
    config: ModelConfig, chosen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain_model(config, write_model(tmp_path / "packed", config, chosen))
    fake_kernels.install(monkeypatch)
    model = fake_kernels.hold_words(load_model(tmp_path / "packed", threads=1))
    with torch.inference_mode():
        found, truth = model(TOKENS), expected(TOKENS)
    assert float((found - truth).norm() / truth.norm()) < 5e-3


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere")
