"""Presets: what each sets, and what wins over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.convert import PRESETS, PresetName, Recipe, apply_overrides, default_recipe, presets
from ernieq.pack import PackedReader
from tests.cli.quantizing import CODE, SAMPLE, done, refused, run
from tests.convert.conversions import file_hashes, write_words


def preset_recipe(name: PresetName) -> Recipe:
    return apply_overrides(default_recipe(2), PRESETS[name].settings(), "preset")


def test_balanced_is_the_default_recipe() -> None:
    assert preset_recipe(PresetName.BALANCED) == default_recipe(2)


def test_presets_order_time_and_text() -> None:
    fast, balanced, best = (preset_recipe(name) for name in PresetName)
    assert fast.encode.first_pass_steps < balanced.encode.first_pass_steps == best.encode.first_pass_steps
    assert [recipe.calibration.windows for recipe in (fast, balanced, best)] == [32, 64, 460]
    assert [recipe.tune.enabled for recipe in (fast, balanced, best)] == [False, False, True]


def test_the_docstring_s_table_says_what_the_presets_hold() -> None:
    rows = [line.split("|") for line in (presets.__doc__ or "").splitlines() if line.startswith("| ")][1:]
    stated = {
        row[1].strip(): (row[2].split(":")[0].strip(), int(row[3].split(":")[0]), row[4].strip())
        for row in rows
    }
    full = PRESETS[PresetName.BALANCED].first_pass_steps
    assert stated == {
        str(name): (
            "full" if preset.first_pass_steps == full else "short",
            preset.windows,
            "tuned" if preset.tune_steps else "as rounded",
        )
        for name, preset in PRESETS.items()
    }


@pytest.fixture
def source(tiny: Callable[..., Path]) -> Path:
    directory = tiny(layers=2)
    write_words(directory.parent / "words.txt", 2500)  # 78 windows of 32
    return directory


def recipe_of(source: Path, out: Path, *options: str | Path) -> dict[str, Any]:
    """The recipe in the manifest of a conversion that no option gives its number of windows."""
    text = source.parent / "words.txt"
    done(run("quantize", source, "--out", out, "--text", text, *CODE, "--window", "32", *options))
    return dict(PackedReader(out).manifest.recipe)


def test_the_recipe_records_the_values_of_the_preset(source: Path, tmp_path: Path) -> None:
    fast = recipe_of(source, tmp_path / "fast", "--preset", "fast")
    default = recipe_of(source, tmp_path / "default")
    assert (fast["calibration"]["windows"], default["calibration"]["windows"]) == (32, 64)
    assert fast["encode"]["first_pass_steps"] < default["encode"]["first_pass_steps"]
    assert recipe_of(source, tmp_path / "balanced", "--preset", "balanced") == default
    assert file_hashes(tmp_path / "fast", "*.safetensors") != file_hashes(tmp_path / "default", "*.safetensors")


def test_fast_is_the_short_first_pass_of_the_fast_preset(source: Path, tmp_path: Path) -> None:
    flag = recipe_of(source, tmp_path / "flag", "--fast", "--windows", "32")
    preset = recipe_of(source, tmp_path / "preset", "--preset", "fast")
    assert flag == preset
    assert file_hashes(tmp_path / "flag", "*.safetensors") == file_hashes(tmp_path / "preset", "*.safetensors")


def test_options_and_recipe_files_win_over_the_preset(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[calibration]\nwindows = 9\n[encode]\nfirst_pass_steps = 128\n")
    found = recipe_of(source, tmp_path / "file", "--preset", "fast", "--recipe", file)
    assert (found["calibration"]["windows"], found["encode"]["first_pass_steps"]) == (9, 128)
    found = recipe_of(source, tmp_path / "option", "--preset", "fast", *SAMPLE)
    assert found["calibration"]["windows"] == 4
    assert found["encode"]["first_pass_steps"] == PRESETS[PresetName.FAST].first_pass_steps


def test_best_tunes_unless_it_is_told_not_to(source: Path, tmp_path: Path) -> None:
    quick = ("--windows", "8", "--tune-steps", "2")
    best = recipe_of(source, tmp_path / "best", "--preset", "best", *quick)
    assert PackedReader(tmp_path / "best").manifest.report["tuning"]["steps"] == 2
    assert (best["tune"]["enabled"], best["calibration"]["windows"]) == (True, 8)
    off = recipe_of(source, tmp_path / "off", "--preset", "best", "--windows", "8", "--no-tune")
    assert not off["tune"]["enabled"]
    assert PackedReader(tmp_path / "off").manifest.report["tuning"] is None
    file = tmp_path / "recipe.toml"
    file.write_text("[tune]\nenabled = false\n")
    assert not recipe_of(source, tmp_path / "file", "--preset", "best", "--windows", "8", "--recipe", file)[
        "tune"
    ]["enabled"]


@pytest.mark.parametrize("mode", [["--dry-run"], ["--json"]])
def test_best_says_that_it_does_not_tune_with_stored_hessians(
    source: Path, tmp_path: Path, mode: list[str]
) -> None:
    hessians = tmp_path / "hessians"
    done(run("calibrate", source, "--out", hessians, "--text", source.parent / "words.txt", *SAMPLE))
    stored: list[str | Path] = [
        "quantize",
        source,
        "--out",
        tmp_path / "out",
        "--hessians",
        hessians,
        "--preset",
        "best",
        *CODE,
    ]
    result = run(*stored, *mode)
    done(result)
    lines = [line for line in result.stderr.splitlines() if line.startswith("not tuned: ")]
    assert lines == ["not tuned: it needs the calibration text, and stored Hessians have none"]
    assert "not tuned" not in run(*stored, *mode, "--no-tune", "--overwrite").stderr
    refused(run(*stored, *mode, "--tune", "--overwrite"), 2, "--tune needs the calibration text")
