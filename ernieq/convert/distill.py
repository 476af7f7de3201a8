"""Tune scales, norms and routers of a quantized model by distillation: least KL(bf16 || quantized) on text.

Source: knowledge distillation (arXiv 1503.02531) at temperature 1; Adam (arXiv 1412.6980), cosine schedule.
A tenth of the windows is held out. It decides when to stop, and whether anything is changed at all. Every
number that is compared is that of scales and norms as the file stores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ernieq.convert.recipe import TuneSettings
from ernieq.convert.teacher import Teacher
from ernieq.convert.tunable import TunableModel

HELD_OUT = 10  # the last tenth of the windows
# Rows of logits alive at once, in three tables of the vocabulary's width.
LOGIT_ROWS = 512
# Tokens whose activations are held for a gradient: 3 GB in float32 for a model of 18 layers, 1024 wide.
TOKENS_AT_ONCE = 2048
_WARM_UP = 5  # steps in which the step size grows to its full length
CHECKS = 5  # comparisons on the held-out windows
# Tuning ends where a divergence is so many times that of the start. A rise by less is no reason: the long steps
# at first often raise it, and the short ones at the end bring it down.
_DIVERGED = 2.0
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TuningReport:
    """What tuning did.

    Args:
        before: mean KL(bf16 || quantized) of the held-out windows before, nats a token.
        after: the same afterwards; equal if nothing was gained and all stays as it was.
        steps: steps that were made.
        held_out_tokens: tokens of the held-out windows.
    """

    before: float
    after: float
    steps: int
    held_out_tokens: int

    @property
    def gained(self) -> bool:
        """Whether scales and norms were changed."""
        return self.after < self.before


class Distillation:
    """Tunes a model.

    Args:
        teacher: the bf16 model, which has seen all windows.
        student: the quantized one; its changes learn.
        windows: (windows, length) int64, at least two, calibration text.
        settings: steps, batch, step size.
        seed: of the order of the windows.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: TunableModel,
        windows: Tensor,
        settings: TuneSettings,
        seed: int,
    ) -> None:
        held = max(1, len(windows) // HELD_OUT)
        self._teacher, self._student, self._settings = teacher, student, settings
        self._train, self._held = windows[:-held], windows[-held:]
        self._generator = torch.Generator().manual_seed(seed)
        self._changes = list(student.changes())

    @torch.enable_grad()
    def run(self, on_step: Callable[[int, int], None] = lambda *_: None) -> TuningReport:
        """Tune; the student keeps the best changes that were met, or none.

        Args:
            on_step: called with steps done and steps in all.
        """
        steps = self._settings.steps
        optimizer = torch.optim.Adam([change.requires_grad_() for change in self._changes], betas=_BETAS)
        before = best = self.held_out()
        kept, done = self._copy(), 0
        for batch in self._batches(steps):
            for group in optimizer.param_groups:
                group["lr"] = self._step_size(done)
            self._gradient(batch)
            self._student.scales.collect()
            optimizer.step()
            optimizer.zero_grad()
            self._student.scales.refresh()
            done += 1
            on_step(done, steps)
            if done % max(1, steps // CHECKS) and done < steps:
                continue
            found = self.held_out()
            if found < best:
                best, kept = found, self._copy()
            if not found < _DIVERGED * before:  # NaN is not
                break
        for change, value in zip(self._changes, kept, strict=True):
            change.requires_grad_(False).copy_(value)
        self._student.scales.refresh()
        return TuningReport(before, best, done, self._held.numel())

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean KL(bf16 || quantized) of the held-out windows, nats a token."""
        first, total = len(self._train), 0.0
        for start in range(0, len(self._held), self._windows_at_once):
            part = self._held[start : start + self._windows_at_once]
            states = self._student.states(part)
            wanted = self._teacher.states(slice(first + start, first + start + len(part)))
            total += sum(float(loss) for loss in self._losses(states, wanted))
        return total / self._held.numel()

    @property
    def _windows_at_once(self) -> int:
        return max(1, TOKENS_AT_ONCE // self._held.shape[1])

    def _batches(self, count: int) -> Iterator[Tensor]:
        """Numbers of the windows of so many steps; all windows are seen before one is seen again."""
        size = max(1, self._settings.batch_tokens // self._train.shape[1])
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(count):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self._train), generator=self._generator)])
            batch, order = order[:size], order[size:]
            yield batch

    def _step_size(self, done: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * done / self._settings.steps))
        return self._settings.learning_rate * falling * min(1.0, (done + 1) / _WARM_UP)

    def _gradient(self, batch: Tensor) -> None:
        """Add the gradient of a batch's mean divergence, a few windows and a few rows of logits at a time."""
        tokens = batch.numel() * self._train.shape[1]
        for part in batch.split(self._windows_at_once):
            states = self._student.states(self._train[part])
            cut = states.detach().requires_grad_()
            for loss in self._losses(cut, self._teacher.states(part)):
                (loss / tokens).backward()
            states.backward(cut.grad)

    def _losses(self, states: Tensor, wanted: Tensor) -> Iterator[Tensor]:
        """Sums of KL(bf16 || quantized) over a few rows of logits at a time."""
        for found, aim in zip(
            states.flatten(0, 1).split(LOGIT_ROWS), wanted.flatten(0, 1).split(LOGIT_ROWS), strict=True
        ):
            log_probs, target = self._student.log_probs(found), self._teacher.log_probs(aim)
            yield functional.kl_div(log_probs, target, reduction="sum", log_target=True)

    def _copy(self) -> list[Tensor]:
        return [change.detach().clone() for change in self._changes]
