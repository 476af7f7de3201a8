"""What can't end well is refused before anything long, by name; every tensor of the source has one fate."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.checkpoint import Checkpoint, open_checkpoint
from ernieq.convert import Plan, audited, audited_plan, check_preflight, make_plan, staged_bytes
from ernieq.convert.groups import LayerReport
from ernieq.convert.preflight import least_memory
from ernieq.convert.resources import Memory
from ernieq.errors import BackendUnavailableError, StorageError, VerificationError
from ernieq.pack import Coverage
from tests.convert.conversions import convert, quick_recipe

Tiny = Callable[..., Path]
GIGABYTE = 10**9


def planned(source: Path) -> tuple[Checkpoint, Plan]:
    checkpoint = open_checkpoint(source)
    return checkpoint, make_plan(checkpoint, quick_recipe())


def free_disk(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, count))


def test_the_disk_must_hold_output_matrices_and_two_snapshots_of_both_streams(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan = planned(tiny())
    snapshots = 2 * 2 * 4 * 32 * 32 * 4  # both streams twice, 4 windows of 32 tokens, 32 wide, float32
    assert staged_bytes(checkpoint.config, plan, 4 * 32) == plan.output_bytes + snapshots
    needed = 2 * plan.output_bytes + snapshots + 50_000_000

    def check(free: int, **options: Any) -> None:
        free_disk(monkeypatch, free)
        check_preflight(checkpoint, plan, quick_recipe(), tmp_path / "packed", overwrite=False, **options)

    check(needed)
    with pytest.raises(
        StorageError,
        match=rf"{tmp_path} has .* free and the conversion needs 50\.1 MB: 40\.5 kB for the output",
    ):
        check(needed - 1)
    check(needed - snapshots, calibrated=False)


def test_what_an_earlier_run_has_staged_need_not_be_free(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan = planned(tiny())
    needed = plan.output_bytes + staged_bytes(checkpoint.config, plan, 4 * 32) + 50_000_000
    free_disk(monkeypatch, needed - 5000)
    with pytest.raises(StorageError):
        check_preflight(checkpoint, plan, quick_recipe(), tmp_path / "packed", overwrite=False)
    (tmp_path / "packed.partial" / "units").mkdir(parents=True)
    (tmp_path / "packed.partial" / "units" / "0").write_bytes(bytes(5000))
    check_preflight(checkpoint, plan, quick_recipe(), tmp_path / "packed", overwrite=False)


def test_too_little_memory_is_refused_and_little_memory_is_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan = planned(tiny())
    least = least_memory(checkpoint.config, 4 * 32, on_gpu=False)

    def check(available: int, swap: int = 0) -> list[str]:
        memory = Memory(available, swap)
        monkeypatch.setattr("ernieq.convert.preflight.available_memory", lambda: memory)
        return check_preflight(checkpoint, plan, quick_recipe(), tmp_path / "packed", overwrite=False)

    assert check(plan.memory_bytes) == []
    assert "600 MB is needed" in check(plan.memory_bytes - 1000)[0]
    assert len(check(least // 2, swap=least)) == 1
    with pytest.raises(
        BackendUnavailableError, match="needs at least 250 MB of memory and 100 MB is available"
    ):
        check(100_000_000)


@pytest.mark.parametrize(
    "changes", [{}, {"moe_num_experts": 0, "model_type": "ernie4_5"}, {"vocab_size": 1 << 20}]
)
@pytest.mark.parametrize("windows", [4, 10_000])
def test_the_least_memory_is_below_what_is_expected(tiny: Tiny, changes: dict[str, Any], windows: int) -> None:
    from ernieq.convert.plan import _memory

    config = dataclasses.replace(open_checkpoint(tiny()).config, **changes)
    recipe = quick_recipe(windows=windows)
    assert 0 < least_memory(config, windows * 32, on_gpu=False) < _memory(config, recipe)


def test_a_memory_that_the_system_does_not_tell_stops_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernieq.convert.preflight.available_memory", lambda: None)
    checkpoint, plan = planned(tiny())
    assert check_preflight(checkpoint, plan, quick_recipe(), tmp_path / "packed", overwrite=False) == []


NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda kept: kept[1:], "would be left out: it is neither quantized, kept nor carried"),
        (lambda kept: (*kept, kept[0]), "would be both kept and kept"),
        (
            lambda kept: (*kept, "model.mtp.weight"),
            r"model\.mtp\.weight would be kept, but .* has no such tensor",
        ),
    ],
)
def test_a_coverage_that_does_not_account_for_every_tensor_once_is_refused(
    tiny: Tiny, change: Callable[[tuple[str, ...]], tuple[str, ...]], sentence: str
) -> None:
    checkpoint, plan = planned(tiny(mtp=True))
    coverage = audited_plan(checkpoint, plan)
    assert len(coverage.carried) == 3
    with pytest.raises(VerificationError, match=sentence):
        audited(checkpoint, dataclasses.replace(coverage, kept=change(coverage.kept)))


def test_a_conversion_that_forgets_a_tensor_fails_with_its_name_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernieq.convert.rest import planned_coverage

    def forgetful(*arguments: Any) -> Coverage:
        coverage = planned_coverage(*arguments)
        return dataclasses.replace(coverage, kept=tuple(name for name in coverage.kept if name != NORM))

    monkeypatch.setattr("ernieq.convert.job.planned_coverage", forgetful)
    with pytest.raises(VerificationError, match=f"{NORM} of .* would be left out"):
        convert(tiny(), tmp_path / "packed", quick_recipe())
    assert not (tmp_path / "packed").exists()


def test_a_conversion_that_skips_a_projection_fails_with_its_name_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, skipped = LayerReport.note, "mlp.experts.3.up_proj"

    def skipping(self: LayerReport, encoded: dict[str, Any]) -> None:
        genuine(self, {name: result for name, result in encoded.items() if not name.endswith(skipped)})

    monkeypatch.setattr(LayerReport, "note", skipping)
    with pytest.raises(
        VerificationError, match=rf"model\.layers\.1\.{skipped}\.weight is listed .* not stored"
    ):
        convert(tiny(), tmp_path / "packed", quick_recipe())
    assert not (tmp_path / "packed").exists()
