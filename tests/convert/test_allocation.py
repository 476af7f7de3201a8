"""An allocation holds its target, respects what is pinned, and is not worse than an even setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ernieq.calibrate import CalibrationSample, read_text_file
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import KEEP, Allocator, Goal, Part, Recipe, Target, Workplace, draw_sample, make_plan
from ernieq.convert.probe import balanced, probe_of, typical_divergence
from ernieq.encode import SQUARED_ERROR
from ernieq.errors import UsageError
from tests.convert.conversions import quick_recipe, write_words

Tiny = Callable[..., Path]


def allocator(
    source: Path,
    goal: Goal,
    recipe: Recipe | None = None,
    pinned: Sequence[Part] = (),
    lines: list[str] | None = None,
) -> Allocator:
    recipe = recipe or quick_recipe(windows=8)
    checkpoint = open_checkpoint(source)
    text = read_text_file(write_words(source.parent / "words.txt"))
    sample = draw_sample(checkpoint, [text], recipe)
    place = Workplace.on(torch.device("cpu"))
    say = (lambda _: None) if lines is None else lines.append
    return Allocator(checkpoint, recipe, pinned, goal, sample, place, say)


def test_rates_follow_the_sensitivities_and_the_plan_the_budget(tiny: Tiny) -> None:
    source = tiny(tied=False)
    found = allocator(source, Goal.FILE)
    previous = float("inf")
    for size in (34_000, 40_000, 50_000):
        allocation = found.allocate(Target(Goal.FILE, size))
        assert make_plan(open_checkpoint(source), allocation.recipe).output_bytes <= size
        assert allocation.predicted_kl < previous
        previous = allocation.predicted_kl
    assert allocation.sensitivities == found.sensitivities()


def test_the_decoder_s_bound_leaves_embedding_and_head_as_they_are(tiny: Tiny) -> None:
    source = tiny(tied=False)
    allocation = allocator(source, Goal.DECODER).allocate(Target(Goal.DECODER, 19_000))
    plan = make_plan(open_checkpoint(source), allocation.recipe)
    assert plan.decoder_bytes <= 19_000
    assert (plan.modules["model.embed_tokens"], plan.modules["lm_head"]) == (5, 5)


def test_pinned_parts_and_patterns_keep_their_bits(tiny: Tiny) -> None:
    source = tiny()
    recipe = quick_recipe(parts={Part.ATTENTION: 5}, modules={"model.layers.2.*": 4}, windows=8)
    target = Target(Goal.BITS_PER_PARAMETER, 7.5)
    allocation = allocator(source, target.goal, recipe, [Part.ATTENTION]).allocate(target)
    plan = make_plan(open_checkpoint(source), allocation.recipe)
    for module, bits in plan.modules.items():
        if module.startswith("model.layers.2."):
            assert bits == 4
        elif ".self_attn." in module:
            assert bits == 5


def test_a_size_below_the_smallest_names_the_smallest(tiny: Tiny) -> None:
    found = allocator(tiny(), Goal.FILE)
    with pytest.raises(UsageError, match=r"the smallest that can be reached is \d+\.\d+kB"):
        found.check(Target(Goal.FILE, 1000))
    found.check(Target(Goal.FILE, found.lightest.output_bytes))


def test_a_divergence_is_held_with_the_fewest_bytes(tiny: Tiny) -> None:
    source = tiny()
    found = allocator(source, Goal.DIVERGENCE)
    sizes = []
    for bound in (0.02, 0.05, 0.2):
        allocation = found.allocate_divergence(Target(Goal.DIVERGENCE, bound))
        assert allocation.predicted_kl <= bound
        sizes.append(make_plan(open_checkpoint(source), allocation.recipe).output_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2]
    doubled = found.allocate_divergence(Target(Goal.DIVERGENCE, 0.05), 2 * allocation.factor)
    assert make_plan(open_checkpoint(source), doubled.recipe).output_bytes > sizes[1]
    with pytest.raises(UsageError, match=r"--max-kl 1e-12 can't be reached"):
        found.allocate_divergence(Target(Goal.DIVERGENCE, 1e-12))


def test_an_even_setting_is_kept_where_it_was_measured_to_be_better(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    found = allocator(tiny(), Goal.FILE, lines=lines)
    target = Target(Goal.FILE, found.lightest.output_bytes + 5_000)
    chosen = found.allocate(target)
    assert not chosen.even
    assert not lines
    monkeypatch.setattr(Allocator, "_measure", lambda _self, candidates: np.array([[0.2], [0.1]]))
    even = found.allocate(target)
    assert even.even
    assert even.predicted_kl == 0.1
    assert len(lines) == 1
    assert "even setting" in lines[0]
    assert even.rates != chosen.rates


def test_predictions_add_up_and_are_calibrated_by_all_errors_at_once(tiny: Tiny) -> None:
    found = allocator(tiny(), Goal.FILE)
    allocation = found.allocate(Target(Goal.FILE, found.lightest.output_bytes + 5_000))
    total = sum(allocation.sensitivities[name] * SQUARED_ERROR[bits] for name, bits in allocation.rates.items())
    assert allocation.predicted_kl == pytest.approx(allocation.factor * total)
    assert 0.3 < allocation.factor < 3


def test_scored_windows_and_those_of_the_hessians_are_others() -> None:
    windows = torch.arange(40)[:, None] * 1000 + torch.arange(300)
    probe = probe_of(CalibrationSample(windows, (), 0))
    assert probe.scored.shape == (16, 256)
    assert probe.seen.shape == (16, 300)
    assert not set(probe.scored[:, 0].tolist()) & set(probe.seen[:, 0].tolist())
    single = probe_of(CalibrationSample(windows[:1], (), 0))
    assert (single.scored.shape, single.seen.shape) == ((1, 256), (1, 300))


def test_a_window_that_loses_ten_times_as_much_does_not_decide_alone() -> None:
    even = np.array([[0.03, 0.01], [0.01, 0.03]])
    assert balanced(even) == pytest.approx([0.02, 0.02])
    assert balanced(even * [[10, 1]]) == pytest.approx([0.11, 0.11])
    assert balanced(np.array([[0.2, -1e-9], [0.1, 0.0]])).sum() == pytest.approx(0.15)


def test_a_kept_part_is_not_measured_and_may_have_any_shape(tiny: Tiny) -> None:
    source = tiny(moe=False, intermediate=40)
    recipe = quick_recipe(parts={Part.DENSE_MLP: KEEP}, windows=8)
    found = allocator(source, Goal.FILE, recipe, [Part.DENSE_MLP])
    allocation = found.allocate(Target(Goal.FILE, found.lightest.output_bytes + 3_000))
    kept = {name for name, bits in allocation.rates.items() if ".mlp." in name and bits == KEEP}
    assert len(kept) == 6
    assert {allocation.sensitivities[name] for name in kept} == {0.0}
    assert allocation.predicted_kl > 0


def test_the_typical_divergence_is_not_that_of_the_worst_window() -> None:
    assert typical_divergence(np.array([[0.1, 0.4], [0.09, 1.0]])) == pytest.approx([0.2, 0.3])
