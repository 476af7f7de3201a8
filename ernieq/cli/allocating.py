"""From a target of ``ernieq quantize`` to a recipe, and from ``--max-kl`` to a checkpoint that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ernieq.calibrate import CalibrationSample, TextFile
from ernieq.checkpoint import Checkpoint
from ernieq.cli.conversion_run import ConversionRun
from ernieq.cli.saved_rounds import SavedRounds
from ernieq.convert import (
    Allocation,
    Allocator,
    ConversionReport,
    Goal,
    HessianDirectory,
    Part,
    Recipe,
    Target,
    Workplace,
    check_preflight,
    draw_sample,
)
from ernieq.errors import TextError
from ernieq.evaluate import Budget, Protocol, Windows, evaluate_stream
from ernieq.load import open_stream
from ernieq.records import format_bytes, format_significant

HELD_OUT_WINDOWS = 8
MAX_ROUNDS = 3


@dataclass(frozen=True)
class Allocated:
    """An allocation, what it came from, and windows that its conversion does not see (for ``--max-kl``)."""

    allocation: Allocation
    allocator: Allocator
    held_out: Tensor | None
    saved: SavedRounds


def allocate(run: ConversionRun, recipe: Recipe, target: Target, pinned: Sequence[Part]) -> Allocated:
    """Measure the model and choose the bits of its units.

    Raises:
        UsageError: the target can't be reached.
        TextError: the texts are too short.
        OutputExistsError, StorageError: the output can't be written; said before anything is measured.
    """
    assert not isinstance(run.calibration, HessianDirectory), "chosen_target() refuses them"
    checkpoint, progress = run.checkpoint, run.progress
    saved = SavedRounds.of(run, recipe, target, pinned)
    held_out: Tensor | None = None
    if target.goal is Goal.DIVERGENCE:
        sample, held_out = hold_out(checkpoint, run.calibration, recipe)
        shorter = replace(recipe.calibration, windows=sample.windows.shape[0])
        recipe = replace(recipe, calibration=shorter)
    else:
        sample = run.sample(recipe)

    def on_layer(what: str, done: int, total: int) -> None:
        progress.update(f"measuring: {what}", done, total)
        run.check_stop()

    allocator = Allocator(
        checkpoint,
        recipe,
        pinned,
        target.goal,
        sample,
        Workplace.on(run.device, run.vram_bytes),
        progress.line,
        on_layer,
    )
    allocator.check(target)
    if saved.rounds:
        progress.line("bits were chosen by an earlier run: they are taken from there")
        return Allocated(allocator.recalled(target, saved.rounds[-1]), allocator, held_out, saved)
    check_preflight(
        checkpoint,
        allocator.lightest,
        recipe,
        run.out,
        overwrite=run.overwrite,
        on_gpu=run.device.type == "cuda",
    )
    layers = checkpoint.config.num_hidden_layers
    progress.line(f"measuring what errors cost in {allocator.unit_count} parts of the model ({layers} layers)")
    allocation = allocator.allocate(target)
    saved.begin(allocation)
    return Allocated(allocation, allocator, held_out, saved)


def hold_out(
    checkpoint: Checkpoint, texts: Sequence[TextFile], recipe: Recipe
) -> tuple[CalibrationSample, Tensor]:
    """The calibration sample, and windows of the same texts behind it, which no sample of its size holds.

    Raises:
        TextError: there are not two windows.
    """
    settings = recipe.calibration
    more = replace(settings, windows=settings.windows + HELD_OUT_WINDOWS)
    sample = draw_sample(checkpoint, texts, replace(recipe, calibration=more))
    count = sample.windows.shape[0]
    if count < 2:
        raise TextError("--max-kl needs at least two calibration windows, one of them to check the result on")
    # A short text is shared out: a quarter of it, at most, is held out.
    kept = min(settings.windows, count - min(HELD_OUT_WINDOWS, max(1, count // 4)))
    return replace(sample, windows=sample.windows[:kept]), sample.windows[kept:]


def convert_in_rounds(run: ConversionRun, allocated: Allocated) -> tuple[ConversionReport, float]:
    """Convert until the KL on the held-out windows is within the bound, at most three times.

    A run that was interrupted goes on within its round: rounds before it are neither converted nor measured
    again.

    Returns:
        Report of the last conversion, and the KL that was reached.
    """
    allocation, target, allocator = allocated.allocation, allocated.allocation.target, allocated.allocator
    assert allocated.held_out is not None
    for number in range(max(1, len(allocated.saved.rounds)), MAX_ROUNDS + 1):
        report = run.convert(allocation.recipe, allocation, again=number > 1)
        found = measured_divergence(run, allocated.held_out)
        run.progress.line(
            f"round {number}: KL {format_significant(found)} on held-out windows in "
            f"{format_bytes(run.file_bytes())} (predicted {format_significant(allocation.predicted_kl)}, "
            f"wanted at most {target.amount:g})"
        )
        if found <= target.amount:
            return report, found
        if number == MAX_ROUNDS:
            break
        following = allocator.allocate_divergence(target, allocation.factor * found / allocation.predicted_kl)
        if following.rates == allocation.rates:
            break
        allocation = following
        allocated.saved.begin(allocation)
    run.progress.warn(
        f"{target.option} {target.amount:g} is not held: the KL that was reached is "
        f"{format_significant(found)}; ask for a smaller one to get a larger file"
    )
    return report, found


def measured_divergence(run: ConversionRun, tokens: Tensor) -> float:
    """Mean KL(source || output) over all tokens of windows but each one's last, nats."""
    threads, device = run.options.threads, run.device
    with torch.no_grad():
        packed = open_stream(run.out, device=device, backend=run.options.backend, threads=threads)
        base = open_stream(run.checkpoint.directory, device=device, threads=threads)
        windows = Windows(tokens, 0, None, Protocol.GPTQ)
        scores = evaluate_stream(packed, windows, base, budget=Budget.on(device)).tokens
    assert scores.kl is not None
    return float(scores.kl.mean())
