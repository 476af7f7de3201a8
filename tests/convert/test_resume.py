"""A conversion that was killed anywhere goes on, and gives the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.calibrate import read_text_file
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import Conversion, HessianDirectory, Listener, Recipe, groups, snapshots
from ernieq.convert.layer import LayerQuantizer
from ernieq.convert.recipe import TuneSettings
from ernieq.encode import Batches, EncodeOptions
from ernieq.errors import InterruptedConversionError, JobDiffersError, OutputExistsError, VerificationError
from tests.cli.quantizing import done, run
from tests.convert.conversions import convert, file_hashes, quick_recipe, write_words
from tests.convert.faults import Disk, KilledError

Tiny = Callable[..., Path]

SMALL = {"layers": 2, "experts": 2, "chosen": 1, "shared_experts": 0}


def weights(packed: Path) -> dict[str, str]:
    """Hashes of what must be the same: everything but the manifest, whose time and duration differ."""
    return {name: digest for name, digest in file_hashes(packed).items() if name != "ernieq.json"}


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
    wanted, number = weights(tmp_path / "whole"), 1
    while killed_at(number, lambda: convert(source, out, recipe, text=text)):
        with suppress(OutputExistsError):  # killed when all but the last of the leftovers was removed
            convert(source, out, recipe, text=text)
        assert weights(out) == wanted, number
        assert [path.name for path in out.parent.iterdir()] == ["packed"]
        shutil.rmtree(out.parent)
        number += 1
    assert number > 50


class Stop:
    """Asks a conversion to stop after so many questions."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


class Job:
    """One conversion that is run several times; counts the matrices that each run encodes."""

    def __init__(self, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source, self.out = source, out
        self.recipe: Recipe = quick_recipe()
        self.text = write_words(out.with_suffix(".txt"))
        self.hessians: HessianDirectory | None = None
        self.batch = 1
        self.lines: list[str] = []
        self.encoded: list[str] = []
        for name in ("encode_matrices", "encode_batch"):
            monkeypatch.setattr(groups, name, self._counted(getattr(groups, name)))

    def run(self, stop: int | None = None) -> None:
        """Run it; all that was encoded and said is noted anew."""
        self.encoded.clear()
        self.lines.clear()
        calibration = self.hessians or [read_text_file(self.text)]
        conversion = Conversion(
            open_checkpoint(self.source),
            str(self.source),
            self.recipe,
            calibration,
            EncodeOptions(threads=1),
            Listener(on_line=self.lines.append),
        )
        conversion._experts = Batches(self.batch, "experts")
        asked = Stop(10**9 if stop is None else stop)
        conversion.run(self.out, overwrite=False, card=lambda _: "# a test\n", should_stop=asked)

    def stopped(self, after: int) -> None:
        """Run it until it has been asked so many times whether to stop."""
        with pytest.raises(InterruptedConversionError, match=r"% of the weights are encoded, kept in "):
            self.run(after)
        assert not self.out.exists()

    @property
    def staging(self) -> Path:
        return self.out.with_name("packed.partial")

    def units(self) -> list[Path]:
        return sorted((self.staging / "units").iterdir())

    def _counted(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def encode(weights: Any, *arguments: Any) -> Any:
            for stack in [weights] if isinstance(weights, Mapping) else weights:
                self.encoded += stack
            return genuine(weights, *arguments)

        return encode


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "out").mkdir()
    return Job(tiny(tied=False), tmp_path / "out" / "packed", monkeypatch)


@pytest.fixture
def uninterrupted(job: Job) -> Callable[[], dict[str, str]]:
    """Runs the conversion in one go, takes its hashes and removes it."""

    def convert_whole() -> dict[str, str]:
        job.run()
        found = weights(job.out)
        shutil.rmtree(job.out)
        return found

    return convert_whole


@pytest.mark.parametrize("patience", [0, 1e9], ids=["states at every layer", "states after the first layer"])
@pytest.mark.parametrize("after", [1, 9, 14, 20, 30])
def test_a_stop_after_any_unit_loses_none_and_changes_no_byte(
    job: Job,
    uninterrupted: Callable[[], dict[str, str]],
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
    assert weights(job.out) == wanted
    assert [path.name for path in job.out.parent.iterdir() if path.suffix != ".txt"] == ["packed"]


def test_layers_before_the_saved_states_are_not_run_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    job.stopped(25)  # within the last of three layers
    layers, genuine = list[int](), LayerQuantizer.run

    def noted(self: LayerQuantizer, index: int, *arguments: Any) -> Any:
        layers.append(index)
        return genuine(self, index, *arguments)

    monkeypatch.setattr(LayerQuantizer, "run", noted)
    job.run()
    assert layers == [2]


@pytest.mark.parametrize("after", [8, 12, 21])
def test_experts_in_batches_are_resumed_in_the_same_batches(
    job: Job, uninterrupted: Callable[[], dict[str, str]], after: int
) -> None:
    job.batch = 3
    wanted = uninterrupted()
    job.stopped(after)
    job.batch = 4  # more memory is free now: it must not matter
    job.run()
    assert weights(job.out) == wanted


@pytest.mark.parametrize("after", [3, 18])
def test_with_stored_hessians_finished_units_are_taken_too(
    job: Job, uninterrupted: Callable[[], dict[str, str]], tmp_path: Path, after: int
) -> None:
    options = ("--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu")
    done(run("calibrate", job.source, "--text", job.text, *options, "--out", tmp_path / "hessians"))
    job.hessians = HessianDirectory(tmp_path / "hessians")
    wanted, everything = uninterrupted(), len(job.encoded)
    job.stopped(after)
    before = len(job.encoded)
    job.run()
    assert before + len(job.encoded) == everything
    assert weights(job.out) == wanted


def test_a_stop_while_scales_are_tuned_keeps_every_matrix(
    job: Job, uninterrupted: Callable[[], dict[str, str]]
) -> None:
    job.recipe = dataclasses.replace(job.recipe, tune=TuneSettings(enabled=True, steps=4, window=16))
    wanted, everything = uninterrupted(), len(job.encoded)
    job.stopped(36)
    assert len(job.encoded) == everything
    job.run()
    assert job.encoded == []
    assert weights(job.out) == wanted


@pytest.mark.parametrize("damage", ["lost", "altered"])
def test_a_damaged_unit_is_named_and_encoded_again(
    job: Job, uninterrupted: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(snapshots, "PATIENCE", 0)
    wanted = uninterrupted()
    job.stopped(25)
    entries = [json.loads(line) for line in (job.staging / "journal.jsonl").read_text().splitlines()]
    entry = next(entry for entry in entries if entry.get("modules") == ["model.layers.0.self_attn.o_proj"])
    unit = job.staging / "units" / f"{entry['key']}.safetensors"
    if damage == "lost":
        unit.unlink()
    else:
        raw = bytearray(unit.read_bytes())
        raw[-9] ^= 1
        unit.write_bytes(raw)
    job.run()
    assert any("self_attn.o_proj is encoded again" in line for line in job.lines)
    assert job.encoded.count("self_attn.o_proj") in (1, 2)  # that of the last layer was still to come
    assert weights(job.out) == wanted


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
