"""A conversion accounts for every tensor, is repeatable, and loses less where it is given more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.bundled import bundled_model
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import KEEP, HessianDirectory, Part, apply_overrides
from ernieq.convert.export import export_bf16
from ernieq.errors import RecipeError, ShapeError, UnsupportedModelError
from ernieq.load import load_model
from ernieq.pack import PackedReader, verify_packed
from tests.convert.conversions import (
    convert,
    decoded_model,
    file_hashes,
    logits_of,
    quick_recipe,
    write_words,
)

Tiny = Callable[..., Path]

MODELS: dict[str, dict[str, Any]] = {
    "moe": {},
    "moe without shared experts": {"shared_experts": 0},
    "moe every second layer": {"interval": 2, "start": 0, "layers": 4},
    "dense": {"moe": False},
    "dense with biases": {"moe": False, "use_bias": True},
    "moe with biases and a head": {"use_bias": True, "tied": False},
    "untied": {"tied": False},
    "sharded": {"shards": 3},
    "with multi-token prediction": {"mtp": True},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_source_tensor_is_quantized_kept_or_carried(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = tiny(**options)
    before = file_hashes(source)
    convert(source, tmp_path / "packed", quick_recipe())
    reader, checkpoint = PackedReader(tmp_path / "packed"), open_checkpoint(source)
    coverage = reader.manifest.coverage
    assert coverage is not None
    assert sorted(coverage.quantized + coverage.kept + coverage.carried) == checkpoint.names()
    assert {name for name in checkpoint.names() if ".mtp_" in name} == set(coverage.carried)
    matrices = ("*_proj.weight", "*embed_tokens.weight", "lm_head.weight")
    own = set(checkpoint.names()) - set(coverage.carried)
    assert set(coverage.quantized) == {
        name for name in own if any(fnmatchcase(name, pattern) for pattern in matrices)
    }
    for name in coverage.kept + coverage.carried:
        stored, info = reader.tensor(name), checkpoint.info(name)
        assert (stored.dtype, stored.shape) == (info.dtype, info.shape)
        assert bytes(stored.data) == bytes(checkpoint.read_bytes(name))
    assert verify_packed(tmp_path / "packed").quantized == len(coverage.quantized)
    assert file_hashes(source) == before


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_packed_model_computes_what_its_decoded_weights_compute(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = tiny(**options)
    convert(source, tmp_path / "packed", quick_recipe())
    found = logits_of(load_model(tmp_path / "packed", threads=1))
    torch.testing.assert_close(
        found, logits_of(decoded_model(source, tmp_path / "packed")), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(found, logits_of(load_model(source)), atol=1e-3)


def test_the_packed_model_computes_what_its_export_computes_but_for_bf16(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(moe=False)  # no router, whose choice could turn on a rounding
    convert(source, tmp_path / "packed", quick_recipe())
    export_bf16(tmp_path / "packed", tmp_path / "plain", threads=1)
    found, plain = logits_of(load_model(tmp_path / "packed")), logits_of(load_model(tmp_path / "plain"))
    assert float((found - plain).square().mean()) < 1e-4 * float(found.square().mean())


def test_the_same_conversion_gives_the_same_bytes_on_any_number_of_threads(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(tied=False)
    for name, threads in (("one", 1), ("again", 1), ("two", 2)):
        convert(source, tmp_path / name, quick_recipe(), threads=threads)
    hashes = [file_hashes(tmp_path / name, "*.safetensors") for name in ("one", "again", "two")]
    assert hashes[0]
    assert hashes[0] == hashes[1] == hashes[2]


def test_another_seed_gives_other_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    convert(source, tmp_path / "zero", quick_recipe())
    convert(source, tmp_path / "one", quick_recipe(seed=1))
    zero, one = (PackedReader(tmp_path / name) for name in ("zero", "one"))
    for module in ("model.embed_tokens", "model.layers.2.self_attn.q_proj"):
        assert (zero.encoded(module).signs != one.encoded(module).signs).any()
    assert (zero.manifest.seed, one.manifest.seed) == (0, 1)


@pytest.mark.parametrize(
    ("part", "pattern"),
    [
        (Part.ROUTED_EXPERTS, "*.experts.*"),
        (Part.SHARED_EXPERTS, "*.shared_experts.*"),
        (Part.ATTENTION, "*.self_attn.*"),
        (Part.DENSE_MLP, "model.layers.0.mlp.*"),
        (Part.EMBEDDING, "model.embed_tokens"),
        (Part.HEAD, "lm_head"),
    ],
)
def test_a_part_of_16_bits_keeps_the_bytes_of_the_source_and_no_other_does(
    tiny: Tiny, tmp_path: Path, part: Part, pattern: str
) -> None:
    source = tiny(tied=False)
    convert(source, tmp_path / "packed", quick_recipe(parts={part: KEEP}))
    reader, checkpoint = PackedReader(tmp_path / "packed"), open_checkpoint(source)
    matrices = {
        name.removesuffix(".weight")
        for name in checkpoint.names()
        if name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight"))
    }
    kept = {module for module in matrices if fnmatchcase(module, pattern)}
    assert kept
    assert set(reader.modules()) == matrices - kept
    for module in kept:
        assert bytes(reader.tensor(f"{module}.weight").data) == bytes(checkpoint.read_bytes(f"{module}.weight"))


def test_module_patterns_decide_over_parts_and_the_last_match_wins(tiny: Tiny, tmp_path: Path) -> None:
    patterns = {"model.layers.1.*": 3.5, "*.experts.2.*": 4, "model.layers.1.self_attn.q_proj": KEEP}
    report = convert(tiny(), tmp_path / "packed", quick_recipe(modules=patterns))
    reader = PackedReader(tmp_path / "packed")
    bits = {module: reader.code_of(module).bits_per_weight for module in reader.modules()}
    assert bits == report.plan.modules
    assert "model.layers.1.self_attn.q_proj" not in bits
    assert bits["model.layers.1.self_attn.k_proj"] == 3.5
    assert bits["model.layers.1.mlp.experts.0.up_proj"] == 3.5
    assert bits["model.layers.1.mlp.experts.2.up_proj"] == 4
    assert bits["model.layers.2.mlp.experts.0.up_proj"] == 2
    assert bits["model.layers.2.self_attn.q_proj"] == 4


def test_the_error_of_every_layer_and_of_the_logits_falls_with_the_bits(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    wanted = logits_of(load_model(source))
    layer_errors, logit_errors = [], []
    for bits in (2, 2.5, 3.5, 5):
        parts = dict.fromkeys(Part, bits)
        report = convert(source, tmp_path / f"{bits}", quick_recipe(parts=parts))
        layer_errors.append([layer.output_error for layer in report.layers])
        logit_errors.append(float((logits_of(load_model(tmp_path / f"{bits}")) - wanted).square().mean()))
    for worse, better in itertools.pairwise(layer_errors):
        assert all(high > low > 0 for high, low in zip(worse, better, strict=True))
    assert logit_errors == sorted(logit_errors, reverse=True)


def test_the_reported_output_error_is_that_of_the_hidden_states(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(), write_words(tmp_path / "words.txt")
    report = convert(source, tmp_path / "packed", quick_recipe(), text=text)
    ids = [1] + [int(word[1:]) for word in text.read_text().split()] + [2]
    tokens = torch.tensor(ids[: 4 * 32]).view(4, 32)
    states: list[list[torch.Tensor]] = []
    for model in (load_model(source), decoded_model(source, tmp_path / "packed")):
        found: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _module, _inputs, output, found=found: found.append(output))
        with torch.no_grad():
            model(tokens)
        states.append(found)
    for layer, wanted, got in zip(report.layers, *states, strict=True):
        expected = float((got - wanted).square().sum() / wanted.square().sum())
        assert layer.output_error == pytest.approx(expected, rel=1e-2)


def test_token_counts_of_experts_add_up_to_the_choices_of_all_tokens(tiny: Tiny, tmp_path: Path) -> None:
    report = convert(tiny(), tmp_path / "packed", quick_recipe())
    assert report.calibration.tokens == 4 * 32
    assert [sum(layer.expert_tokens) for layer in report.layers] == [0, 256, 256]
    manifest = PackedReader(tmp_path / "packed").manifest
    assert [layer["expert_tokens"] for layer in manifest.report["layers"]] == [
        layer.expert_tokens for layer in report.layers
    ]
    assert set(manifest.report["proxy_errors"]) == set(report.plan.modules)


def test_an_expert_that_no_token_reaches_is_encoded_with_its_layers_statistics(
    tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(experts=32, chosen=1, router_bias=1.0)
    report = convert(source, tmp_path / "packed", quick_recipe())
    starved = [expert for expert, tokens in enumerate(report.layers[1].expert_tokens) if tokens == 0]
    assert starved
    for expert in starved:
        assert report.layers[1].expert_trust[expert] == 0
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            assert 0 < report.layers[1].errors[f"mlp.experts.{expert}.{matrix}"] < 0.3


def test_correction_lowers_the_error_of_the_logits_on_text_it_has_not_seen(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(layers=4), write_words(tmp_path / "words.txt", 4000)
    wanted = logits_of(load_model(source))
    errors = {}
    for damping in (0.4, 1e9):
        recipe = quick_recipe(windows=100, correction_damping=damping)
        report = convert(source, tmp_path / f"{damping}", recipe, text=text)
        logits = logits_of(load_model(tmp_path / f"{damping}"))
        errors[damping] = (report.layers[-1].output_error, float((logits - wanted).square().mean()))
    assert errors[0.4][0] < 0.97 * errors[1e9][0]
    assert errors[0.4][1] < errors[1e9][1]


def test_an_output_of_kept_layers_alone_differs_by_its_embedding_only(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    parts = dict.fromkeys(Part, KEEP) | {Part.EMBEDDING: 5}
    report = convert(source, tmp_path / "packed", quick_recipe(parts=parts))
    assert PackedReader(tmp_path / "packed").modules() == ["model.embed_tokens"]
    assert all(0 < layer.output_error < 0.05 for layer in report.layers)
    assert [layer.errors for layer in report.layers] == [{}, {}, {}]


@pytest.mark.parametrize("name", ["model.layers.1.mlp.extra.weight", "lm_head.bias", "model.norm.bias"])
def test_a_tensor_that_would_change_the_result_is_refused_before_anything_is_encoded(
    tiny: Tiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tiny import TinyOptions, tiny_tensors, write_tensors

    source = tiny()
    write_tensors(source, tiny_tensors(TinyOptions()) | {name: torch.ones(64)})
    encoded: list[str] = []
    monkeypatch.setattr("ernieq.convert.groups.encode_matrices", lambda *_: encoded.append("a matrix"))
    with pytest.raises(UnsupportedModelError, match=name):
        convert(source, tmp_path / "packed", quick_recipe())
    assert encoded == []
    assert not (tmp_path / "packed").exists()


def test_a_side_that_is_no_multiple_of_16_is_refused_unless_it_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(moe=False, intermediate=40)
    with pytest.raises(ShapeError, match=r"mlp\.\w+_proj\.weight has shape .* multiples of 16"):
        convert(source, tmp_path / "packed", quick_recipe())
    convert(source, tmp_path / "packed", quick_recipe(parts={Part.DENSE_MLP: KEEP}))
    assert logits_of(load_model(tmp_path / "packed")).isfinite().all()


@pytest.mark.parametrize("pattern", ["*.mlp.gate", "*norm*", "*.moe_statics.*", "model.layers.9.*"])
def test_a_pattern_for_what_is_never_quantized_is_refused(tiny: Tiny, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(RecipeError, match="never"):
        convert(tiny(), tmp_path / "packed", quick_recipe(modules={pattern: 4}))


def test_a_recipe_that_keeps_everything_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to quantize"):
        convert(tiny(), tmp_path / "packed", quick_recipe(parts=dict.fromkeys(Part, KEEP)))


def test_the_plan_foretells_the_size_of_the_output(tmp_path: Path) -> None:
    recipe = apply_overrides(
        dataclasses.replace(quick_recipe(), parts=dict.fromkeys(Part, 2)),
        {"modules": {"model.layers.[123].*": KEEP, "model.embed_tokens": KEEP}},
        "test",
    )
    text = tmp_path / "words.txt"
    text.write_text("The old house stood on a hill. " * 40)
    report = convert(bundled_model(), tmp_path / "packed", recipe, text=text)
    size = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert report.plan.output_bytes == pytest.approx(size, rel=0.01)


def test_stored_hessians_give_what_their_directory_says(tiny: Tiny, tmp_path: Path) -> None:
    from ernieq.errors import CheckpointError

    with pytest.raises(CheckpointError, match="ernieq calibrate"):
        convert(tiny(), tmp_path / "packed", quick_recipe(), hessians=HessianDirectory(tmp_path / "none"))
    assert not (tmp_path / "packed").exists()
