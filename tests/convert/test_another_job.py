"""What is there of another job is neither taken nor lost; an output that is there already is known."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import pytest
import torch

from ernieq.convert.recipe import TuneSettings
from ernieq.errors import JobDiffersError
from tests.convert.conversions import file_hashes, write_words
from tests.convert.faults import KilledError
from tests.convert.interrupted import Job


def change_recipe(job: Job) -> None:
    job.recipe = dataclasses.replace(job.recipe, parts={**job.recipe.parts, "routed_experts": 3})  # type: ignore[dict-item]


def change_text(job: Job) -> None:
    write_words(job.text, seed=5)


def change_source(job: Job) -> None:
    shard = job.source / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)


def change_config(job: Job) -> None:
    config = job.source / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))


def change_program(job: Job) -> None:
    description = json.loads((job.staging / "job.json").read_text())
    description["identity"]["program"]["ernieq"] = "0.0.1"
    (job.staging / "job.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_recipe, r"recipe: parts\.routed_experts 2 -> 3"),
        (change_text, r"text packed\.txt changed"),
        (change_source, r"source shard model\.safetensors differs"),
        (change_config, r"source config\.json differs"),
        (change_program, r"written by ernieq 0\.0\.1"),
    ],
)
def test_another_job_is_refused_with_what_differs_and_loses_nothing(
    job: Job, change: Callable[[Job], None], named: str
) -> None:
    job.stopped(5)
    before = [path.name for path in job.units()]
    change(job)
    with pytest.raises(JobDiffersError, match=named) as refusal:
        job.run()
    assert "--restart" in str(refusal.value)
    assert [path.name for path in job.units()] == before


def test_a_source_that_was_only_touched_is_compared_and_taken(job: Job) -> None:
    job.stopped(5)
    os.utime(job.source / "model.safetensors", (1, 1))
    job.run()
    assert any("comparing its contents" in line for line in job.lines)


@pytest.mark.usefixtures("threads_put_back")
@pytest.mark.parametrize("tuned", [False, True])
def test_another_number_of_threads_is_mentioned_if_something_is_tuned(job: Job, tuned: bool) -> None:
    job.recipe = dataclasses.replace(job.recipe, tune=TuneSettings(enabled=tuned, steps=2, window=16))
    torch.set_num_threads(1)
    job.stopped(5)
    torch.set_num_threads(2)
    job.run()
    assert any("begun with --threads 1" in line for line in job.lines) is tuned


def test_an_output_that_was_published_before_a_kill_is_known_to_be_finished(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernieq.convert import Staging

    def kill(_: Staging) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "remove", kill)
        with pytest.raises(KilledError):
            job.run()
    before = file_hashes(job.out)
    job.run()
    assert "is finished already" in job.lines[0]
    assert job.encoded == []
    assert file_hashes(job.out) == before
    assert not job.staging.exists()
