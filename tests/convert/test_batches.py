"""Experts in batches: what a GPU does, on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.calibrate import MlpPass, Streams, read_text_file, stay_on_gpu
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import Conversion, ConversionReport, HessianDirectory, Listener, Workplace
from ernieq.encode import Batches, EncodeOptions
from ernieq.errors import BackendUnavailableError
from ernieq.model import ModelConfig
from ernieq.pack import PackedReader, verify_packed
from tests.cli.quantizing import done, run
from tests.convert.conversions import convert, quick_recipe, write_words

Tiny = Callable[..., Path]


def convert_in_batches(
    source: Path,
    out: Path,
    size: int,
    *,
    phases: list[str] | None = None,
    hessians: HessianDirectory | None = None,
    modules: Mapping[str, float] | None = None,
) -> ConversionReport:
    """``conversions.convert``, but with several experts at once."""
    calibration = hessians or [read_text_file(write_words(out.with_suffix(".txt")))]
    listener = Listener() if phases is None else Listener(on_phase=phases.append)
    recipe, options = quick_recipe(modules=modules), EncodeOptions(threads=1)
    conversion = Conversion(open_checkpoint(source), str(source), recipe, calibration, options, listener)
    conversion._experts = Batches(size, "experts", listener.on_phase)
    return conversion.run(out, overwrite=False, card=lambda _: "# a test\n")


def assert_alike(found: ConversionReport, wanted: ConversionReport) -> None:
    assert found.errors.keys() == wanted.errors.keys()
    for name, error in wanted.errors.items():
        assert found.errors[name] == pytest.approx(error, rel=0.1), name
    for layer, expected in zip(found.layers, wanted.layers, strict=True):
        assert layer.expert_tokens == expected.expert_tokens
        assert layer.output_error == pytest.approx(expected.output_error, rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_batches_of_experts_lose_no_more_than_one_expert_after_the_other(
    tiny: Tiny, tmp_path: Path, size: int
) -> None:
    source = tiny(hidden=64, expert_width=32)
    wanted = convert(source, tmp_path / "one", quick_recipe())
    found = convert_in_batches(source, tmp_path / "batch", size)
    assert_alike(found, wanted)
    verify_packed(tmp_path / "batch")
    assert PackedReader(tmp_path / "batch").modules() == PackedReader(tmp_path / "one").modules()


def test_experts_of_a_batch_may_have_bits_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    patterns = {"*.experts.2.*": 2.5, "*.experts.1.up_proj": 3, "*.experts.0.down_proj": 16}
    report = convert_in_batches(tiny(), tmp_path / "packed", 4, modules=patterns)
    reader = PackedReader(tmp_path / "packed")
    bits = {module: reader.code_of(module).bits_per_weight for module in reader.modules()}
    assert bits == report.plan.modules


def test_stored_hessians_are_used_in_batches_too(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(hidden=64, expert_width=32), write_words(tmp_path / "words.txt")
    options = ("--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu")
    done(run("calibrate", source, "--text", text, *options, "--out", tmp_path / "hessians"))
    stored = HessianDirectory(tmp_path / "hessians")
    wanted = convert(source, tmp_path / "one", quick_recipe(), hessians=stored)
    found = convert_in_batches(source, tmp_path / "batch", 4, hessians=stored)
    assert_alike(found, wanted)


def fail_beyond(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let moments of more experts than ``capacity`` at once run out of memory, after the gates are encoded."""
    real = MlpPass.experts_down_moments

    def limited(self: MlpPass, experts: Sequence[int]) -> Any:
        if len(experts) > capacity:
            raise torch.OutOfMemoryError("the test's GPU is full")
        return real(self, experts)

    monkeypatch.setattr(MlpPass, "experts_down_moments", limited)


def test_a_batch_that_runs_out_of_memory_is_halved_and_nothing_is_lost_or_done_twice(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, phases = tiny(hidden=64, expert_width=32), list[str]()
    wanted = convert_in_batches(source, tmp_path / "two", 2)
    fail_beyond(2, monkeypatch)
    found = convert_in_batches(source, tmp_path / "packed", 4, phases=phases)
    assert phases.count("out of GPU memory: going on with batches of 2 experts") == 1
    assert found.errors == wanted.errors
    assert found.layers == wanted.layers
    verify_packed(tmp_path / "packed")


def test_an_expert_that_does_not_fit_alone_ends_the_conversion_with_the_ways_out(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_beyond(0, monkeypatch)
    with pytest.raises(BackendUnavailableError, match=r"--vram .* --device cpu"):
        convert_in_batches(tiny(), tmp_path / "packed", 4)
    assert not (tmp_path / "packed").exists()


def test_the_manifest_says_what_did_the_work(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny(), tmp_path / "packed", quick_recipe())
    report = PackedReader(tmp_path / "packed").manifest.report
    assert (report["device"], report["search_arithmetic"]) == ("cpu", "int16")


def big_model() -> ModelConfig:
    """The shapes of ERNIE-4.5-21B-A3B."""
    from tests.tiny import TinyOptions, tiny_config

    options = TinyOptions(layers=28, experts=64, chosen=6, hidden=2560, intermediate=12288, expert_width=1536)
    heads = dataclasses.replace(options, heads=20, kv_heads=4, head_dim=128, vocabulary=103424)
    return ModelConfig.from_dict(tiny_config(heads))


@pytest.mark.parametrize(
    ("gigabytes", "windows", "resident"), [(8, 64, False), (16, 64, True), (16, 256, False)]
)
def test_memory_is_shared_out_so_that_a_gpu_is_kept_busy(gigabytes: int, windows: int, resident: bool) -> None:
    vram, tokens, config = gigabytes * 1_000_000_000, windows * 2048, big_model()
    workplace = Workplace(torch.device("cuda", 0), vram)
    assert stay_on_gpu(tokens, config.hidden_size, vram) == resident
    batches = workplace.expert_batches(config, tokens, lambda _: None)
    assert 8 <= batches.size <= 64  # 192 rows of tiles each: thousands, and not more than there is room for
    room = workplace.encoding_bytes(config, tokens)
    assert room is not None
    assert room < vram - 1_500_000_000 - (Streams.bytes_held(tokens, config.hidden_size) if resident else 0)


def test_the_cpu_has_no_bound_and_works_on_one_expert_at_a_time() -> None:
    workplace = Workplace.on(torch.device("cpu"))
    assert workplace.encoding_bytes(big_model(), 4096) is None
    assert workplace.expert_batches(big_model(), 4096, lambda _: None).size == 1
