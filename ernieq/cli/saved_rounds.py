"""Bits that were chosen by measurement, kept beside the output so that a resumed run does not measure again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ernieq.cli.conversion_run import ConversionRun
from ernieq.convert import (
    ALLOCATION,
    Allocation,
    HessianDirectory,
    Part,
    Recipe,
    Staging,
    Target,
    Workplace,
    differences,
    job_identity,
    other_job,
    text_identity,
)


@dataclass(frozen=True)
class SavedRounds:
    """The allocation of every round that was begun, first to last; one unless ``--max-kl`` was asked for.

    Args:
        staging: keeps them; None for a dry run.
        identity: what they were measured on.
        rounds: ``Allocation.record`` of each.
    """

    staging: Staging | None
    identity: dict[str, Any]
    rounds: list[dict[str, Any]]

    @classmethod
    def of(cls, run: ConversionRun, recipe: Recipe, target: Target, pinned: Sequence[Part]) -> SavedRounds:
        """What an earlier run of the same command has left.

        Raises:
            JobDiffersError: it was another command.
        """
        assert not isinstance(run.calibration, HessianDirectory)
        texts = text_identity(run.calibration)
        identity = job_identity(run.checkpoint, recipe, texts, Workplace.on(run.device, run.vram_bytes))
        identity["target"] = {target.option: target.amount, "stated parts": " ".join(sorted(set(pinned)))}
        found = run.staging.read_json(ALLOCATION) if run.staging else None
        if run.staging is None or found is None:
            return cls(run.staging, identity, [])
        if words := differences(found["identity"], identity):
            raise other_job(run.staging, words)
        return cls(run.staging, identity, found["rounds"])

    def begin(self, allocation: Allocation) -> None:
        """Note the allocation of a round that begins."""
        self.rounds.append(allocation.record())
        if self.staging is not None:
            self.staging.write_json(ALLOCATION, {"identity": self.identity, "rounds": self.rounds})
