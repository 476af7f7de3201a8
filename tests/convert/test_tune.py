"""Tuning after rounding lowers the divergence, and changes scales and norms alone; or it changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ernieq.calibrate import read_text_file
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import (
    KEEP,
    Part,
    Recipe,
    TuneSettings,
    TuningReport,
    Workplace,
    draw_sample,
    estimate_time,
    make_plan,
    tune,
    tune_model,
)
from ernieq.convert.tunable import TunableModel
from ernieq.encode import EncodeOptions
from ernieq.load import load_model
from ernieq.pack import PackedReader, verify_packed
from tests.convert.conversions import convert, file_hashes, logits_of, quick_recipe, write_words

Tiny = Callable[..., Path]
WORDS = 4000
CPU = torch.device("cpu")


def tuning_recipe(*, enabled: bool = True, steps: int = 40, learning_rate: float = 0.01) -> Recipe:
    """Two bits for everything but the embedding, so that there is much to win."""
    parts: dict[Part, int] = {part: 2 for part in Part if part is not Part.EMBEDDING}
    tune = TuneSettings(enabled, steps, batch_tokens=1024, window=32, learning_rate=learning_rate)
    return dataclasses.replace(quick_recipe(parts=parts, windows=120), tune=tune)


def tuned_and_not(source: Path, folder: Path, **options: Any) -> TuningReport:
    """Convert without tuning to ``off`` and with it to ``on``."""
    text = write_words(folder / "words.txt", WORDS)
    convert(source, folder / "off", tuning_recipe(enabled=False), text=text)
    report = convert(source, folder / "on", tuning_recipe(**options), text=text).tuning
    assert report is not None
    return report


@torch.no_grad()
def divergence(source: Path, packed: Path, windows: torch.Tensor) -> float:
    """Mean KL(source || packed) of windows, nats a token, from the files that were written."""
    wanted, found = (load_model(path, threads=1)(windows).log_softmax(-1) for path in (source, packed))
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


def windows_of(source: Path, text: Path, recipe: Recipe) -> torch.Tensor:
    return draw_sample(open_checkpoint(source), [read_text_file(text)], recipe).windows


def test_tuning_lowers_the_divergence_on_text_that_it_has_not_seen(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    tuned_and_not(source, tmp_path)
    unseen = windows_of(source, write_words(tmp_path / "unseen.txt", WORDS, seed=1), tuning_recipe())
    untuned = divergence(source, tmp_path / "off", unseen)
    assert divergence(source, tmp_path / "on", unseen) < 0.95 * untuned  # 0.90 was measured


def test_the_model_that_is_loaded_has_the_divergence_that_tuning_reported(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    report = tuned_and_not(source, tmp_path)
    windows = windows_of(source, tmp_path / "words.txt", tuning_recipe())
    held = windows[-report.held_out_tokens // 32 :]
    assert report.held_out_tokens == 12 * 32
    assert divergence(source, tmp_path / "off", held) == pytest.approx(report.before, rel=0.01)
    assert divergence(source, tmp_path / "on", held) == pytest.approx(report.after, rel=0.01)


def test_tuning_changes_scales_norms_and_routers_and_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    tuned_and_not(source, tmp_path)
    off, on = PackedReader(tmp_path / "off"), PackedReader(tmp_path / "on")
    for module in off.modules():
        before, after = off.encoded(module), on.encoded(module)
        assert (before.packed == after.packed).all()
        assert (before.signs == after.signs).all()
        assert after.scale.dtype == np.float16
        assert np.isfinite(after.scale).all()
        assert (after.scale > 0).all()
    assert any((off.encoded(module).scale != on.encoded(module).scale).any() for module in off.modules())
    coverage = on.manifest.coverage
    assert coverage is not None
    learnt = ("norm.weight", "mlp.gate.weight")
    assert set(coverage.tuned) == {name for name in on.tensors() if name.endswith(learnt)}
    for name in on.tensors():
        before_raw, after_raw = off.tensor(name), on.tensor(name)
        assert (before_raw.dtype, before_raw.shape) == (after_raw.dtype, after_raw.shape)
        if name not in coverage.tuned:
            assert bytes(before_raw.data) == bytes(after_raw.data)
    report = verify_packed(tmp_path / "on")
    assert (report.tuned, report.kept) == (len(coverage.tuned), len(coverage.kept))


@pytest.mark.parametrize(
    "options",
    [{"moe": False, "use_bias": True}, {"untied": True}, {"dtype": torch.float16}, {"dtype": torch.float32}],
    ids=str,
)
def test_any_model_can_be_tuned(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    untied = options.pop("untied", False)
    source = tiny(**options, tied=not untied)
    report = tuned_and_not(source, tmp_path)
    assert report.after < report.before
    found = verify_packed(tmp_path / "on")
    norms, routers = 7, 2 if options.get("moe", True) else 0
    assert found.tuned == norms + routers


def test_an_absurd_step_size_leaves_the_bytes_as_they_were(tiny: Tiny, tmp_path: Path) -> None:
    report = tuned_and_not(tiny(), tmp_path, learning_rate=1e4)
    assert not report.gained
    assert report.after == report.before
    assert report.steps < 40  # it gave up
    assert file_hashes(tmp_path / "on", "*.safetensors") == file_hashes(tmp_path / "off", "*.safetensors")
    assert PackedReader(tmp_path / "on").manifest.coverage == PackedReader(tmp_path / "off").manifest.coverage


def test_the_same_tuning_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    source, text = tiny(), write_words(tmp_path / "words.txt", WORDS)
    for name in ("one", "two"):
        convert(source, tmp_path / name, tuning_recipe(steps=5), text=text)
    assert file_hashes(tmp_path / "one", "*.safetensors") == file_hashes(tmp_path / "two", "*.safetensors")


@pytest.mark.parametrize(
    "kept", [{}, {Part.EMBEDDING: KEEP}, {Part.ATTENTION: KEEP, Part.SHARED_EXPERTS: KEEP}]
)
def test_before_tuning_the_tunable_model_computes_what_the_packed_one_does(
    tiny: Tiny, tmp_path: Path, kept: dict[Part, int]
) -> None:
    source = tiny(use_bias=True)
    convert(source, tmp_path / "packed", quick_recipe(parts=kept))
    reader = PackedReader(tmp_path / "packed")
    matrices = {module: reader.encoded(module) for module in reader.modules()}
    tunable = TunableModel(open_checkpoint(source), matrices, CPU)
    wanted = logits_of(load_model(tmp_path / "packed", threads=1))
    torch.testing.assert_close(logits_of(tunable.model), wanted, rtol=1e-4, atol=1e-4)


def test_too_little_text_to_hold_some_out_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    source, recipe = tiny(), tuning_recipe()
    convert(source, tmp_path / "packed", recipe=dataclasses.replace(recipe, tune=TuneSettings()))
    reader = PackedReader(tmp_path / "packed")
    matrices = {module: reader.encoded(module) for module in reader.modules()}
    tuned = tune_model(open_checkpoint(source), matrices, torch.full((1, 32), 5), recipe, Workplace.on(CPU))
    assert tuned.report is None
    assert "too short" in tuned.untuned
    assert tuned.matrices == matrices
    assert not tuned.tensors


def test_a_model_that_is_too_large_is_said_not_to_be_tuned(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny()
    convert(source, tmp_path / "off", tuning_recipe(enabled=False))
    monkeypatch.setattr(tune, "LARGEST_ON_CPU", 1000)
    report = convert(source, tmp_path / "on", tuning_recipe())
    assert report.tuning is None
    assert report.untuned.startswith("the model has 0.0 B parameters; tuning on a CPU")
    assert file_hashes(tmp_path / "on", "*.safetensors") == file_hashes(tmp_path / "off", "*.safetensors")


@pytest.mark.parametrize(("vram", "refused"), [(51_000_000_000, True), (52_000_000_000, False)])
def test_the_21b_model_is_tuned_on_a_gpu_that_holds_it_in_16_bits(vram: int, refused: bool) -> None:
    found = tune.refusal(21_825_000_000, Workplace(torch.device("cuda"), vram))
    assert (found is not None) == refused


def test_a_narrow_model_and_its_gradients_are_nearly_those_of_float32(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(moe=False)  # no router, whose choice could turn on a rounding
    convert(source, tmp_path / "packed", quick_recipe())
    reader = PackedReader(tmp_path / "packed")
    matrices = {module: reader.encoded(module) for module in reader.modules()}
    tokens, gradients, logits = torch.arange(3, 35)[None], [], []
    for narrow in (False, True):
        tunable = TunableModel(open_checkpoint(source), matrices, CPU, narrow=narrow)
        for change in tunable.changes():
            change.requires_grad_()
        logits.append(tunable.log_probs(tunable.states(tokens)))
        logits[-1][..., 7].sum().backward()
        tunable.scales.collect()
        gradients.append(torch.cat([change.grad for change in tunable.changes() if change.grad is not None]))
    for exact, rounded in (logits, gradients):
        error = (exact - rounded).detach().norm() / exact.detach().norm()
        assert 0 < float(error) < 0.05


def test_the_plan_counts_the_memory_and_the_time_of_tuning(tiny: Tiny) -> None:
    checkpoint, options = open_checkpoint(tiny()), EncodeOptions(threads=1)
    without, with_it = tuning_recipe(enabled=False), tuning_recipe(steps=1_000_000)
    plan = make_plan(checkpoint, without)
    assert make_plan(checkpoint, with_it).memory_bytes > plan.memory_bytes
    plain, tuned = (estimate_time(checkpoint.config, plan, with_it, options, tuned=on) for on in (False, True))
    assert tuned.rest > plain.rest
