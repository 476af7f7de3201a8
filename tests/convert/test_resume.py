"""A conversion that was killed anywhere goes on, and gives the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.calibrate import AttentionPass, MlpPass
from ernieq.convert import HessianDirectory, groups, snapshots
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.recipe import TuneSettings
from ernieq.convert.snapshots import Mark
from ernieq.errors import OutputExistsError, VerificationError
from tests.cli.quantizing import done, run
from tests.convert.conversions import convert, quick_recipe, write_words
from tests.convert.faults import Disk, KilledError
from tests.convert.interrupted import Job, contents

Tiny = Callable[..., Path]

SMALL = {"layers": 2, "experts": 2, "chosen": 1, "shared_experts": 0}


def killed_at(number: int, work: Callable[[], Any]) -> bool:
    """Kill the work at that operation of the disk; False if it does not need so many."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, number)
        try:
            work()
        except KilledError:
            return True
    return False


def test_a_kill_at_any_operation_of_the_disk_loses_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    source, text, out = tiny(**SMALL), write_words(tmp_path / "words.txt"), tmp_path / "out" / "packed"
    recipe = quick_recipe()
    convert(source, tmp_path / "whole", recipe, text=text)
    wanted, number = contents(tmp_path / "whole"), 1
    while killed_at(number, lambda: convert(source, out, recipe, text=text)):
        with suppress(OutputExistsError):  # killed when all but the last of the leftovers was removed
            convert(source, out, recipe, text=text)
        assert contents(out) == wanted, number
        assert [path.name for path in out.parent.iterdir()] == ["packed"]
        shutil.rmtree(out.parent)
        number += 1
    assert number > 50


@pytest.mark.parametrize("patience", [0, 1e9], ids=["states at every layer", "states after the first layer"])
@pytest.mark.parametrize("after", [1, 9, 14, 20, 30])
def test_a_stop_after_any_unit_loses_none_and_changes_no_byte(
    job: Job,
    uninterrupted: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    patience: float,
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", patience)
    wanted, everything = uninterrupted(), len(job.encoded)
    job.stopped(after)
    before = len(job.encoded)
    job.run()
    assert before + len(job.encoded) == everything
    assert "resuming from" in job.lines[0]
    assert contents(job.out) == wanted
    assert [path.name for path in job.out.parent.iterdir() if path.suffix != ".txt"] == ["packed"]


@pytest.mark.parametrize(
    ("after", "attended"), [(19, False), (25, True)], ids=["within attention", "within experts"]
)
def test_what_is_before_the_saved_states_is_not_run_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, after: int, attended: bool
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    job.stopped(after)  # within the last of three layers
    marks, genuine = list[Mark](), LayerQuantizer.run

    def noted(self: LayerQuantizer, begin: Mark, *arguments: Any) -> Any:
        marks.append(begin)
        return genuine(self, begin, *arguments)

    monkeypatch.setattr(LayerQuantizer, "run", noted)
    job.run()
    assert marks == [Mark(2, attended=attended)]


@pytest.mark.parametrize(("after", "attention"), [(19, 1), (25, 0)], ids=["within attention", "within experts"])
def test_hessians_are_collected_for_what_is_missing_alone(
    job: Job, monkeypatch: pytest.MonkeyPatch, after: int, attention: int
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    job.stopped(after)  # within the last of three layers
    collected = Counter[str]()
    for owner, name in (
        (AttentionPass, "input_moments"),
        (AttentionPass, "context_moments"),
        (AttentionPass, "advance"),
        (MlpPass, "experts_input_moments"),
        (MlpPass, "experts_down_moments"),
    ):
        genuine = vars(owner)[name]

        def counted(*arguments: Any, name: str = name, genuine: Any = genuine) -> Any:
            collected[name] += 1
            return genuine(*arguments)

        monkeypatch.setattr(owner, name, counted)
    job.run()
    experts = [name for name in job.encoded if ".experts." in name]
    assert collected["input_moments"] == 0
    assert collected["context_moments"] == collected["advance"] == attention
    assert collected["experts_input_moments"] == sum("gate_proj" in name for name in experts)
    assert collected["experts_down_moments"] == sum("down_proj" in name for name in experts)


@pytest.mark.parametrize("after", [8, 12, 21])
def test_experts_in_batches_are_resumed_in_the_same_batches(
    job: Job, uninterrupted: Callable[[], dict[str, Any]], after: int
) -> None:
    job.batch = 3
    wanted = uninterrupted()
    job.stopped(after)
    job.batch = 4  # more memory is free now: it must not matter
    job.run()
    assert contents(job.out) == wanted


@pytest.mark.parametrize("after", [3, 18])
def test_with_stored_hessians_finished_units_are_taken_too(
    job: Job, uninterrupted: Callable[[], dict[str, Any]], tmp_path: Path, after: int
) -> None:
    options = ("--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu")
    done(run("calibrate", job.source, "--text", job.text, *options, "--out", tmp_path / "hessians"))
    job.hessians = HessianDirectory(tmp_path / "hessians")
    wanted, everything = uninterrupted(), len(job.encoded)
    job.stopped(after)
    before = len(job.encoded)
    job.run()
    assert before + len(job.encoded) == everything
    assert contents(job.out) == wanted


def test_a_stop_while_scales_are_tuned_keeps_every_matrix(
    job: Job, uninterrupted: Callable[[], dict[str, Any]]
) -> None:
    job.recipe = dataclasses.replace(job.recipe, tune=TuneSettings(enabled=True, steps=4, window=16))
    wanted, everything = uninterrupted(), len(job.encoded)
    job.stopped(36)
    assert len(job.encoded) == everything
    job.run()
    assert job.encoded == []
    assert contents(job.out) == wanted


@pytest.mark.parametrize("damage", ["lost", "altered"])
@pytest.mark.parametrize("layer", [0, 2], ids=["a finished layer's", "before the saved states"])
def test_a_damaged_unit_is_named_and_encoded_again(
    job: Job,
    uninterrupted: Callable[[], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    layer: int,
    damage: str,
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    wanted = uninterrupted()
    job.stopped(25)  # within the experts of the last of three layers
    entries = [json.loads(line) for line in (job.staging / "journal.jsonl").read_text().splitlines()]
    module = f"model.layers.{layer}.self_attn.o_proj"
    entry = next(entry for entry in entries if entry.get("modules") == [module])
    unit = job.staging / "units" / f"{entry['key']}.safetensors"
    if damage == "lost":
        unit.unlink()
    else:
        raw = bytearray(unit.read_bytes())
        raw[-9] ^= 1
        unit.write_bytes(raw)
    job.run()
    assert any(f"{module} is encoded again" in line for line in job.lines)
    assert job.encoded.count("self_attn.o_proj") == 1
    assert contents(job.out) == wanted


def test_matrices_that_do_not_decode_to_what_was_meant_are_not_journalled(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = groups.__dict__["encode_matrices"]

    def altered(*arguments: Any) -> Any:
        results = genuine(*arguments)
        name = next(iter(results))
        decoded = results[name].decoded.clone()
        decoded.view(-1)[5] = torch.nextafter(decoded.view(-1)[5], torch.tensor(9.0))
        return results | {name: dataclasses.replace(results[name], decoded=decoded)}

    monkeypatch.setattr(groups, "encode_matrices", altered)
    with pytest.raises(VerificationError, match=r"model\.embed_tokens does not decode to the weights"):
        job.run()
    assert not job.staging.exists()
