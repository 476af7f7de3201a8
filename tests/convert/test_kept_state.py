"""What a job keeps beside its matrices: calibration tokens, and hidden states now and then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ernieq.calibrate import CalibrationSample, Streams
from ernieq.convert import Staging, snapshots
from ernieq.convert.journal import Journal
from ernieq.convert.kept_sample import sample_of_job
from ernieq.convert.overlap import BackgroundQueue

FILES = (("a/words.txt", "0" * 64), ("b/words.txt", "1" * 64))


@pytest.fixture
def queue() -> Iterator[BackgroundQueue]:
    with BackgroundQueue() as running:
        yield running


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
    tmp_path: Path,
    queue: BackgroundQueue,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    interrupted: bool,
    due: bool,
) -> None:
    monkeypatch.setattr(snapshots, "_FIRST_BYTES_A_SECOND", rate)
    journal = Journal(tmp_path / "journal.jsonl")
    saved = snapshots.Snapshots(tmp_path, journal, queue, interrupted=interrupted)
    streams = Streams(torch.zeros(1, 32, 32), torch.zeros(1, 32, 32))
    assert saved.due(streams) is due
    saved.save(snapshots.Mark(0), streams)
    monkeypatch.setattr(snapshots, "PATIENCE", 1e12)
    assert not saved.due(streams), "a second one waits"


def test_snapshots_take_a_small_part_of_the_time(
    tmp_path: Path, queue: BackgroundQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def written(path: Path, *_: object) -> str:
        clock[0] += 2
        path.touch()
        return ""

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(snapshots, "write_large_file", written)
    saved = snapshots.Snapshots(tmp_path, Journal(tmp_path / "journal.jsonl"), queue, interrupted=True)
    streams, times = Streams(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)), list[float]()
    while clock[0] < 300:
        if saved.due(streams):
            times.append(clock[0])
            saved.save(snapshots.Mark(len(times), attended=True), streams)
        clock[0] += 1
    assert times == [0, 3, 80, 160, 240], "each waits for forty times what all but the first have taken"


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (snapshots.Mark(2), snapshots.Mark(1, attended=True)),
        (snapshots.Mark(1, attended=True), snapshots.Mark(1, attended=True)),
        (snapshots.Mark(1), None),
    ],
)
def test_a_snapshot_that_is_too_far_on_is_not_taken(
    tmp_path: Path, queue: BackgroundQueue, limit: snapshots.Mark, found: snapshots.Mark | None
) -> None:
    (tmp_path / "state").mkdir()
    journal = Journal(tmp_path / "journal.jsonl")
    saved = snapshots.Snapshots(tmp_path / "state", journal, queue, interrupted=False)
    reference, quantized = torch.rand(1, 4, 4), torch.rand(1, 4, 4)
    saved.save(snapshots.Mark(1), Streams(quantized, reference))
    saved.save(snapshots.Mark(1, attended=True), Streams(reference, quantized))
    assert len(list((tmp_path / "state").iterdir())) == 1
    last = saved.last(limit)
    assert (last and last[0]) == found
    if last is not None:
        assert torch.equal(last[1].reference, reference)
        assert torch.equal(last[1].quantized, quantized)
