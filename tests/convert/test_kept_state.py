"""What a job keeps beside its matrices: calibration tokens, and hidden states now and then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ernieq.calibrate import CalibrationSample, Streams
from ernieq.convert import Staging, snapshots
from ernieq.convert.journal import Journal
from ernieq.convert.kept_sample import sample_of_job

FILES = (("a/words.txt", "0" * 64), ("b/words.txt", "1" * 64))


@pytest.mark.parametrize("damage", ["none", "lost", "altered"])
def test_tokens_are_drawn_once_and_again_only_if_they_were_damaged(tmp_path: Path, damage: str) -> None:
    drawn = []

    def draw() -> CalibrationSample:
        drawn.append(1)
        return CalibrationSample(torch.arange(12).view(3, 4), FILES, seed=7)

    with Staging(tmp_path / "packed") as staging:
        sample_of_job(staging, draw)
        assert not staging.has_units, "tokens are no finished work"
        kept = staging.path / "sample" / "sample.safetensors"
        if damage == "altered":
            kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
        elif damage == "lost":
            kept.unlink()
        found = sample_of_job(staging, draw)
    assert len(drawn) == 1 + (damage != "none")
    assert torch.equal(found.windows, torch.arange(12).view(3, 4))
    assert (found.files, found.seed, found.tokens) == (FILES, 7, 12)


@pytest.mark.parametrize(
    ("rate", "interrupted", "due"), [(1e12, False, True), (1, False, False), (1, True, True)]
)
def test_the_first_snapshot_waits_for_its_size_unless_the_job_was_interrupted_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, interrupted: bool, due: bool
) -> None:
    monkeypatch.setattr(snapshots, "_FIRST_BYTES_A_SECOND", rate)
    journal = Journal(tmp_path / "journal.jsonl")
    saved = snapshots.Snapshots(tmp_path, journal, interrupted=interrupted)
    streams = Streams(torch.zeros(1, 32, 32), torch.zeros(1, 32, 32))
    assert saved.due(streams) is due
