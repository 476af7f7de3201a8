"""``ernieq reproduce``: what comes out the same, what does not, and what is refused before the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from ernieq.convert import check_arithmetic
from ernieq.errors import BackendUnavailableError
from ernieq.pack import PackedReader
from tests.cli.quantizing import done, quantize, refused, run
from tests.convert.conversions import write_words
from tests.hostile.packed_damage import edit_json
from tests.tiny import write_tiny

DIFFERS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny source and its packed checkpoint, for reading alone."""
    place = tmp_path_factory.mktemp("made")
    write_words(place / "words.txt")
    done(quantize(write_tiny(place / "source", shards=2), place / "packed"))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy to change; its manifest names the source of ``made``."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def reproduce(packed: Path, *options: str | Path) -> Result:
    return run("reproduce", packed, "--threads", "1", *options)


def change_manifest(packed: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_json(packed / "ernieq.json", change)


def test_an_untouched_checkpoint_is_reproduced_and_nothing_is_left_beside_it(place: Path) -> None:
    before = sorted(path.name for path in place.iterdir())
    printed = done(reproduce(place / "packed", "--text", place / "words.txt"))
    assert "model.safetensors  same\nconfig.json  same\n" in printed
    assert "is reproduced: all" in printed
    assert sorted(path.name for path in place.iterdir()) == before


def test_another_seed_in_the_manifest_gives_other_bytes_and_exit_code_8(place: Path) -> None:
    def reseed(manifest: dict[str, Any]) -> None:
        manifest["seed"] = manifest["recipe"]["seed"] = 5

    change_manifest(place / "packed", reseed)
    result = reproduce(place / "packed", "--text", place / "words.txt")
    assert result.exit_code == DIFFERS
    assert "model.safetensors  differs: " in result.stdout
    assert "tensors, the first " in result.stdout
    assert "config.json  same" in result.stdout
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: 1 of ")


def test_json_tells_of_every_file_and_out_keeps_the_new_checkpoint(place: Path) -> None:
    edit_json(place / "packed" / "config.json", lambda config: config.update(note="by hand"))
    options: list[str | Path] = ["--text", place / "words.txt", "--json", "--out", place / "again"]
    result = reproduce(place / "packed", *options)
    assert result.exit_code == DIFFERS
    found = json.loads(result.stdout)
    same = {file["name"]: file["same"] for file in found["files"]}
    assert not found["same"]
    assert [name for name, matches in same.items() if not matches] == ["config.json"]
    old, new = (PackedReader(place / name).manifest for name in ("packed", "again"))
    assert (old.shards, old.source, old.recipe) == (new.shards, new.source, new.recipe)
    refused(reproduce(place / "packed", *options), 2, "again", "--overwrite")


def test_a_changed_a_missing_and_a_foreign_text_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    (place / "words.txt").rename(place / "moved.txt")
    refused(reproduce(place / "packed"), 4, "words.txt", "--text")
    write_words(place / "words.txt", seed=1)
    refused(reproduce(place / "packed", "--text", place / "words.txt"), 4, "words.txt has changed")
    other = write_words(tmp_path / "other.txt", seed=1)
    refused(reproduce(place / "packed", "--text", other), 2, "other.txt", "words.txt")


def test_a_text_beside_the_checkpoint_is_found_without_being_named(place: Path) -> None:
    """``--own-text`` writes there."""
    assert "is reproduced" in done(reproduce(place / "packed"))


def test_a_missing_and_a_changed_source_are_refused_by_name(place: Path) -> None:
    change_manifest(place / "packed", lambda manifest: manifest["source"].update(name_or_path="./gone"))
    refused(reproduce(place / "packed"), 3, "./gone", "--source")
    other = write_tiny(place / "other", shards=2, seed=1)
    refused(reproduce(place / "packed", "--source", other), 3, "model-00001-of-00002.safetensors has changed")
    single = write_tiny(place / "single", shards=1)
    refused(
        reproduce(place / "packed", "--source", single), 3, "model-00001-of-00002.safetensors", "is missing"
    )
    (place / "source" / "tokenizer.json").write_text("{}")
    refused(reproduce(place / "packed", "--source", place / "source"), 3, "tokenizer.json has changed")


def test_stored_hessians_are_asked_for_and_checked_file_by_file(place: Path) -> None:
    stored, packed = place / "hessians", place / "by-hessians"
    sample: list[str | Path] = [
        "--text",
        place / "words.txt",
        "--windows",
        "4",
        "--window",
        "32",
        "--threads",
        "1",
    ]
    done(run("calibrate", place / "source", "--out", stored, "--device", "cpu", *sample))
    done(quantize(place / "source", packed, "--hessians", stored))
    refused(reproduce(packed), 3, "layer-00000.safetensors", "--hessians")
    assert "is reproduced" in done(reproduce(packed, "--hessians", stored))
    file = stored / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    refused(reproduce(packed, "--hessians", stored), 3, "layer-00001.safetensors has changed")
    file.unlink()
    refused(reproduce(packed, "--hessians", stored), 3, "layer-00001.safetensors", "is missing")
    refused(reproduce(place / "packed", "--hessians", stored), 2, "--hessians")


def test_a_tuned_checkpoint_is_tuned_again(place: Path) -> None:
    done(quantize(place / "source", place / "tuned", "--tune", "--tune-steps", "3"))
    assert "is reproduced" in done(reproduce(place / "tuned"))


def test_a_tuning_that_was_asked_for_and_not_done_is_not_done_again(place: Path) -> None:
    def ask(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["tune"]["enabled"] = True

    change_manifest(place / "packed", ask)
    assert "is reproduced" in done(reproduce(place / "packed"))


def test_texts_of_one_name_are_told_apart(place: Path) -> None:
    for folder in ("a", "b"):
        (place / folder).mkdir()
        write_words(place / folder / "words.txt", seed=ord(folder))
    first, second = (("--text", place / folder / "words.txt") for folder in ("b", "a"))
    done(quantize(place / "source", place / "two", *first, *second))
    assert "is reproduced" in done(reproduce(place / "two", *second, *first))  # the manifest's order counts


def test_what_a_gpu_made_is_refused_on_a_cpu_before_anything_is_read(place: Path) -> None:
    made_there = {"device": "NVIDIA H100", "search_arithmetic": "float16"}
    change_manifest(place / "packed", lambda manifest: manifest["report"].update(made_there))
    refused(reproduce(place / "packed", "--device", "cpu"), 7, "NVIDIA H100", "float16", "--device cuda")


def test_what_a_cpu_made_is_refused_on_a_gpu(made: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="--device cpu"):
        check_arithmetic(PackedReader(made / "packed").manifest, torch.device("cuda"))


def test_another_version_is_told_and_the_conversion_runs(place: Path) -> None:
    change_manifest(place / "packed", lambda manifest: manifest.update(ernieq_version="0.0.1"))
    result = reproduce(place / "packed")
    done(result)
    assert "ernieq: made with 0.0.1, run again with " in result.stderr


def test_a_manifest_without_a_recipe_is_refused(place: Path) -> None:
    change_manifest(place / "packed", lambda manifest: manifest.update(recipe={}))
    refused(reproduce(place / "packed"), 6, "recipe")
