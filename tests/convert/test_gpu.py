"""A conversion on a GPU loses what one on the CPU loses, and fits into the memory it is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.bundled import bundled_model, calibration_texts
from ernieq.calibrate import read_text_file
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import (
    CalibrationSettings,
    Conversion,
    ConversionReport,
    Part,
    Recipe,
    TuneSettings,
    default_recipe,
)
from ernieq.encode import EncodeOptions, encode_batch, encode_matrices, input_signs
from ernieq.errors import InterruptedConversionError
from ernieq.pack import PackedReader, verify_packed
from ernieq.trellis import TrellisCode
from tests.cli.quantizing import done, quantize, run
from tests.convert.conversions import file_hashes, quick_recipe, write_words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]

Tiny = Callable[..., Path]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VRAM = 4_000_000_000


def convert_on(
    device: torch.device, source: Path, out: Path, recipe: Recipe, texts: list[Path], vram: int | None = None
) -> ConversionReport:
    calibration = [read_text_file(text) for text in texts]
    conversion = Conversion(
        open_checkpoint(source),
        str(source),
        recipe,
        calibration,
        EncodeOptions(),
        device=device,
        vram_bytes=vram,
    )
    return conversion.run(out, overwrite=False, card=lambda _: "# a test\n")


def assert_alike(found: ConversionReport, wanted: ConversionReport) -> None:
    """Proxy errors within 5 % in the mean of every kind of matrix; a single small one may differ more."""
    assert found.errors.keys() == wanted.errors.keys()
    kinds: dict[str, list[float]] = {}
    for name, error in wanted.errors.items():
        kinds.setdefault(name.split(".")[-1], []).append(found.errors[name] / error)
    for kind, ratios in kinds.items():
        assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05), kind
    for layer, expected in zip(found.layers, wanted.layers, strict=True):
        assert sum(layer.expert_tokens) == sum(expected.expert_tokens)
        assert layer.output_error == pytest.approx(expected.output_error, rel=0.1)


def test_nano_on_the_gpu_has_the_errors_of_the_cpu_and_verifies(tmp_path: Path) -> None:
    recipe = default_recipe(2)
    recipe = dataclasses.replace(
        recipe,
        encode=dataclasses.replace(recipe.encode, state_bits=12),
        calibration=CalibrationSettings(windows=16, window=512),
    )
    texts = [text.path for text in calibration_texts()]
    reports = {
        device: convert_on(device, bundled_model(), tmp_path / device.type, recipe, texts)
        for device in (CPU, GPU)
    }
    assert_alike(reports[GPU], reports[CPU])
    verify_packed(tmp_path / "cuda")
    manifest = PackedReader(tmp_path / "cuda").manifest.report
    assert manifest["device"] == torch.cuda.get_device_name(0)
    assert manifest["search_arithmetic"] == "float16"


@pytest.mark.parametrize(
    "options", [{}, {"moe": False, "use_bias": True}, {"tied": False, "dtype": torch.float16}], ids=str
)
def test_small_models_of_every_kind_convert_on_the_gpu(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = tiny(hidden=128, intermediate=192, expert_width=64, heads=8, **options)
    text = write_words(tmp_path / "words.txt", 4000)
    reports = {
        device: convert_on(device, source, tmp_path / device.type, quick_recipe(windows=64), [text])
        for device in (CPU, GPU)
    }
    assert_alike(reports[GPU], reports[CPU])
    verify_packed(tmp_path / "cuda")


@pytest.mark.parametrize("narrow", [False, True])
def test_tuning_on_the_gpu_gains_what_it_gains_on_the_cpu(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    if narrow:
        monkeypatch.setattr("ernieq.convert.tune._fits", lambda *_: False)
        monkeypatch.setattr("ernieq.convert.job.refusal", lambda *_: None)
    # Two bits nearly everywhere: at the default recipe's bits this model has nothing to gain, on no device.
    parts: dict[Part, float] = {part: 2 for part in Part if part is not Part.EMBEDDING}
    source, text = tiny(), write_words(tmp_path / "words.txt", 4000)
    tune = TuneSettings(enabled=True, steps=40, batch_tokens=1024, window=32, learning_rate=0.01)
    recipe = dataclasses.replace(quick_recipe(parts=parts, windows=120), tune=tune)
    found, wanted = (
        convert_on(device, source, tmp_path / device.type, recipe, [text]).tuning for device in (GPU, CPU)
    )
    assert found is not None
    assert wanted is not None
    # On the CPU 0.909 for two seeds, 0.908 in bfloat16.
    assert found.after < 0.95 * found.before
    assert found.after / found.before == pytest.approx(wanted.after / wanted.before, abs=0.03)
    assert verify_packed(tmp_path / "cuda").tuned == 9  # norms and routers


def test_streams_beside_the_gpu_give_the_result_of_streams_on_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = tiny(hidden=128, expert_width=64), write_words(tmp_path / "words.txt", 4000)
    on = convert_on(GPU, source, tmp_path / "on", quick_recipe(windows=64), [text], VRAM)
    monkeypatch.setattr("ernieq.convert.workplace.stay_on_gpu", lambda *_: False)
    monkeypatch.setattr("ernieq.calibrate.mlp.SEGMENT_TOKENS", 300)
    beside = convert_on(GPU, source, tmp_path / "beside", quick_recipe(windows=64), [text], VRAM)
    assert_alike(beside, on)


def test_the_same_conversion_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(), write_words(tmp_path / "words.txt", 4000)
    for name in ("one", "again"):
        convert_on(GPU, source, tmp_path / name, quick_recipe(), [text], VRAM)
    assert file_hashes(tmp_path / "one", "*.safetensors") == file_hashes(tmp_path / "again", "*.safetensors")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_gives_the_bytes_of_the_first(tiny: Tiny, tmp_path: Path) -> None:
    names = [torch.cuda.get_device_name(index) for index in (0, 1)]
    if names[0] != names[1]:
        pytest.skip(f"needs two GPUs of one kind, and these are {names[0]} and {names[1]}")
    source, text = tiny(hidden=128, expert_width=64), write_words(tmp_path / "words.txt", 4000)
    for index in (0, 1):
        device = torch.device("cuda", index)
        convert_on(device, source, tmp_path / str(index), quick_recipe(windows=64), [text], VRAM)
    assert file_hashes(tmp_path / "0", "*.safetensors") == file_hashes(tmp_path / "1", "*.safetensors")


@pytest.mark.parametrize("after", [1, 4, 9, 16])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, after: int
) -> None:
    source, text = tiny(hidden=64, expert_width=32, tied=False), write_words(tmp_path / "words.txt")
    convert_on(GPU, source, tmp_path / "whole", quick_recipe(), [text], VRAM)
    asked = iter([False] * (after - 1) + [True])
    conversion = Conversion(
        open_checkpoint(source),
        str(source),
        quick_recipe(),
        [read_text_file(text)],
        EncodeOptions(),
        device=GPU,
        vram_bytes=VRAM,
    )
    with pytest.raises(InterruptedConversionError):
        conversion.run(
            tmp_path / "packed", overwrite=False, card=lambda _: "# a test\n", should_stop=lambda: next(asked)
        )
    convert_on(GPU, source, tmp_path / "packed", quick_recipe(), [text], VRAM)
    shards = [file_hashes(tmp_path / name, "*.safetensors") for name in ("whole", "packed")]
    assert shards[0] == shards[1]


def test_memory_stays_within_what_was_given(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(hidden=128, expert_width=64), write_words(tmp_path / "words.txt", 4000)
    torch.cuda.reset_peak_memory_stats()
    convert_on(GPU, source, tmp_path / "packed", quick_recipe(), [text], VRAM)
    assert torch.cuda.max_memory_reserved() <= VRAM
    assert not torch.backends.cuda.matmul.allow_tf32


def test_hessians_collected_on_the_gpu_are_taken_by_both(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(), write_words(tmp_path / "words.txt")
    sample = ("--windows", "4", "--window", "32", "--text", text)
    done(run("calibrate", source, *sample, "--device", "cuda", "--vram", "4", "--out", tmp_path / "hessians"))
    for device in ("cuda", "cpu"):
        stored = ("--hessians", tmp_path / "hessians", "--device", device)
        done(quantize(source, tmp_path / device, *stored))
        verify_packed(tmp_path / device)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_batch_on_the_gpu_has_the_proxy_errors_of_the_cpu(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator)
    inputs = torch.randn(2048, 256, generator=generator) @ mixing
    hessian, signs, code = inputs.T @ inputs / 2048, input_signs(0, "g", 256), TrellisCode(bits, 16)
    stacks = [{"w": torch.randn(128, 256, generator=generator)} for _ in range(3)]
    found = encode_batch(
        [{"w": stack["w"].to(GPU)} for stack in stacks], [hessian.to(GPU)] * 3, signs, code, EncodeOptions()
    )
    for stack, result in zip(stacks, found, strict=True):
        expected = encode_matrices(stack, hessian, signs, code, EncodeOptions())["w"]
        assert result["w"].proxy_error == pytest.approx(expected.proxy_error, rel=0.05)
        alone = encode_matrices({"w": stack["w"].to(GPU)}, hessian.to(GPU), signs, code, EncodeOptions())["w"]
        assert alone.proxy_error == pytest.approx(expected.proxy_error, rel=0.05)
