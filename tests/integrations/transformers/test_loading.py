"""A packed checkpoint in transformers computes what our own runtime computes, and stays packed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from ernieq.decode import TrellisEmbedding, TrellisExperts, TrellisLinear, TrellisWeight
from ernieq.errors import (
    BackendUnavailableError,
    FormatError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from ernieq.integrations.transformers.modules import packed_weights
from ernieq.integrations.transformers.quantizer import ErnieqQuantizer
from ernieq.integrations.transformers.source import open_checked
from ernieq.load import load_model
from ernieq.model import ModelConfig, ParameterRole
from ernieq.pack import MANIFEST_NAME, PackedReader
from tests.integrations.transformers.packed_checkpoints import TOKENS, load, logits, write_packed
from tests.load.packed_model import EVERYTHING, MOE, by_role, write_model
from tests.load.test_load_model import CASES

ROUTER_BIAS = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
GATE_BIAS = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"  # transformers' name for it


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed") / "model")


@pytest.mark.parametrize(("config", "chosen"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_logits_are_those_of_our_runtime(config: ModelConfig, chosen: Any, tmp_path: Path) -> None:
    directory = write_packed(tmp_path / "packed", config, chosen)
    model, info = load(directory, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        torch.testing.assert_close(logits(model), load_model(directory)(TOKENS), rtol=1e-5, atol=1e-5)


def test_the_router_bias_of_these_models_takes_part_in_the_choice(packed: Path) -> None:
    model = load(packed)
    before = logits(model)
    bias = model.get_parameter(GATE_BIAS)
    assert bias.abs().min() > 0
    bias.data.neg_()
    assert not torch.allclose(before, logits(model), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_is_that_of_states_but_not_of_the_router(dtype: torch.dtype, packed: Path) -> None:
    model = load(packed, dtype)
    router = model.get_parameter("model.layers.1.mlp.gate.weight")
    assert model.dtype is dtype
    assert model.model.embed_tokens(TOKENS).dtype is dtype
    assert router.dtype is torch.float32
    found, truth = logits(model), logits(load(packed))
    assert float((found - truth).norm() / truth.norm()) < 0.05


def test_the_dtype_of_the_configuration_is_the_default(tmp_path: Path) -> None:
    config = write_packed(tmp_path / "packed") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dtype is torch.bfloat16


def test_matrices_stay_packed_in_memory(packed: Path) -> None:
    model, reader = load(packed), PackedReader(packed)
    weights = packed_weights(model)
    assert set(weights) == set(reader.modules())
    for name, weight in weights.items():
        assert isinstance(weight, TrellisWeight)
        assert weight.packed.nbytes == reader.info(f"{name}.weight_packed").nbytes
    assert isinstance(model.model.embed_tokens.trellis, TrellisEmbedding)
    assert isinstance(model.model.layers[1].mlp.experts.trellis, TrellisExperts)
    assert isinstance(model.model.layers[0].self_attn.q_proj.trellis, TrellisLinear)
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert matrices == {"model.layers.1.mlp.gate.weight", GATE_BIAS}


def test_no_weight_seems_trainable(packed: Path) -> None:
    assert not any(parameter.requires_grad for parameter in load(packed).parameters())


def test_tokens_generated_with_a_cache_are_those_without(packed: Path) -> None:
    model = load(packed)
    with_cache = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert torch.equal(with_cache, model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_cache=False))
    assert with_cache.shape == (2, 13)


def test_a_pipeline_writes_text(packed: Path) -> None:
    write = pipeline("text-generation", model=str(packed), dtype=torch.float32)
    text = write("w5 w6 w7", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7")
    assert len(text.split()) > 4


@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}, "auto", {"model": "cpu"}]
)
def test_a_device_map_places_the_model(device_map: Any, packed: Path) -> None:
    if device_map == {"model": "cpu"}:
        device_map = {"model": "cpu", "lm_head": "cpu"}
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto takes the GPU here; see test_on_gpu.py")
    torch.testing.assert_close(logits(load(packed, device_map=device_map)), logits(load(packed)))


def test_hooks_that_accelerate_hangs_on_modules_before_the_end_of_loading_still_run(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dispatch(model: Any, _quantizer: Any, device_map: dict[str, Any], *_: Any) -> None:
        accelerate.dispatch_model(model, dict.fromkeys(device_map, "cpu"), force_hooks=True)

    monkeypatch.setattr("transformers.modeling_utils.accelerate_dispatch", dispatch)
    several_places = {"model": "cpu", "lm_head": torch.device("cpu")}  # transformers takes them for two
    model = load(packed, device_map=several_places)
    assert hasattr(model.lm_head, "_hf_hook")
    assert hasattr(model.model.layers[0].self_attn.q_proj, "_hf_hook")
    torch.testing.assert_close(logits(model), logits(load(packed)))


@pytest.mark.parametrize(
    ("device_map", "places"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "cpu and disk"),
        ({"model": 0, "lm_head": "cpu"}, "cpu and cuda"),
        ({"": "mps"}, "mps"),
    ],
)
def test_a_place_that_packed_weights_can_not_go_to_is_refused(
    device_map: Any, places: str, packed: Path
) -> None:
    with pytest.raises(BackendUnavailableError, match=f"weights on {places}; .* pass device_map="):
        load(packed, device_map=device_map)


@pytest.mark.parametrize(
    "name", [ROUTER_BIAS, "model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"]
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING), leave_out=name)
    with pytest.raises(MissingTensorError, match=name):
        load(tmp_path / "packed")


def test_a_tensor_that_transformers_did_not_find_is_named(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_the_renaming(self: ErnieqQuantizer, _conversions: list[Any], _model: Any = None) -> list[Any]:
        return []

    monkeypatch.setattr(ErnieqQuantizer, "update_weight_conversions", forget_the_renaming)
    with pytest.raises(MissingTensorError, match=rf"not found {ROUTER_BIAS} .* random numbers"):
        load(packed)


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = write_packed(tmp_path / "packed") / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 96', '"vocab_size": 112'))
    with pytest.raises(ShapeError, match=r"embed_tokens is a packed matrix of \(96, 64\).*\(112, 64\)"):
        load(tmp_path / "packed")


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    reader = PackedReader(write_packed(tmp_path / "packed"))
    entry = reader.info("model.norm.weight")
    with (reader.path / reader.file_of(entry.name)).open("rb+") as shard:
        shard.seek(entry.begin)
        shard.write(b"\xc0\x7f")  # a NaN in bfloat16
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        load(tmp_path / "packed")


def test_a_quantized_router_is_refused(tmp_path: Path) -> None:
    config = ModelConfig(**{**vars(MOE), "moe_num_experts": 16})
    write_model(tmp_path / "packed", config, by_role({ParameterRole.ROUTER}))
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.gate is quantized, but a router never may be"):
        load(tmp_path / "packed")


def test_a_newer_format_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for file in ("config.json", MANIFEST_NAME):
        path = write_packed(tmp_path / file) / file
        path.write_text(path.read_text().replace('"format_version": "0.2"', '"format_version": "0.3"'))
        with pytest.raises(FormatError, match=r"'0\.3'; this ernieq reads 0\.1 and 0\.2 only: pip install -"):
            load(path.parent)


@pytest.mark.parametrize("version", ["5.16.0", "4.57.6", "5.25.0", "6.0.0.dev0"])
def test_a_transformers_out_of_range_is_refused_with_the_way_out(
    version: str, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(BackendUnavailableError, match=rf"transformers {version} can't .*; pip install 'transf"):
        load(packed)


def test_only_a_causal_language_model_is_made_of_a_packed_checkpoint(packed: Path) -> None:
    with pytest.raises(UsageError, match="not a Ernie4_5_MoeModel; load it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(packed)


def test_tensors_that_come_without_files_are_refused() -> None:
    with pytest.raises(UsageError, match="state_dict"):
        open_checked("anything", None)


def test_the_manifest_of_a_hub_repository_is_fetched_beside_its_shards(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--org--packed" / "snapshots" / "a1b2"
    snapshot.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):  # what transformers fetches by itself
        (snapshot / file).write_bytes((packed / file).read_bytes())

    def fetch(repository: str, name: str, *, cache_dir: Path, revision: str, **_: Any) -> None:
        assert (repository, cache_dir, revision) == ("org/packed", tmp_path, "a1b2")
        (snapshot / name).write_bytes((packed / name).read_bytes())

    monkeypatch.setattr("transformers.utils.hub.cached_file", fetch)
    source = open_checked("org/packed", [str(snapshot / "model.safetensors")])
    assert source.directory == snapshot


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (write_packed(tmp_path / "packed") / MANIFEST_NAME).unlink()
    with pytest.raises(FormatError, match=MANIFEST_NAME):
        load(tmp_path / "packed")


def test_the_saved_configuration_is_the_one_that_was_loaded(packed: Path) -> None:
    stored = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert load(packed).config.quantization_config.to_dict() == stored
