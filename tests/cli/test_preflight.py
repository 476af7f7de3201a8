"""First a conversion says what it will do or why it can't; at the end what it has read and covered."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernieq.calibrate import CalibrationSample, sample_windows
from ernieq.convert import collect
from ernieq.convert.resources import Memory
from tests.cli.quantizing import Untouched, done, quantize, refused
from tests.convert.conversions import file_hashes, write_words
from tests.convert.file_systems import mounted
from tests.tiny import TinyOptions, tiny_tensors, write_tensors, write_tiny

EXPERT = "model.layers.1.mlp.experts.3."
UP, MISSPELT = f"{EXPERT}up_proj.weight", f"{EXPERT}up_porj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_words(tmp_path / "words.txt")
    return write_tiny(tmp_path / "source")


def change(source: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = tiny_tensors(TinyOptions())
    edit(tensors)
    write_tensors(source, tensors)


def rename(tensors: Tensors) -> None:
    tensors[MISSPELT] = tensors.pop(UP)


def drop_expert(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        del tensors[name]


def add_misspelt(tensors: Tensors) -> None:
    tensors[MISSPELT] = tensors[UP].clone()


def add_expert(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(EXPERT)]:
        tensors[name.replace(".3.", ".4.")] = tensors[name].clone()


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("edit", "naming"),
    [
        (rename, (f"the first is {UP}", f"it holds {MISSPELT}, which config.json does not call for")),
        (drop_expert, ("lacks 3 of the", f"the first is {EXPERT}")),
        (add_misspelt, (f"{MISSPELT} in ", "no place in the model")),
        (add_expert, ("model.layers.1.mlp.experts.4.", "no place in the model")),
    ],
)
def test_a_projection_that_would_be_skipped_is_refused_by_its_name(
    source: Path, edit: Callable[[Tensors], object], naming: tuple[str, ...], options: tuple[str, ...]
) -> None:
    change(source, edit)
    before = Untouched(source.parent)
    refused(quantize(source, source.parent / "packed", *options), 3, *naming)
    before.check()


def test_a_tensor_in_two_shards_is_refused_by_its_name(tmp_path: Path) -> None:
    write_words(tmp_path / "words.txt")
    source = write_tiny(tmp_path / "source", shards=2)
    first, second = sorted(source.glob("*.safetensors"))
    name, tensors = next(iter(load_file(first))), load_file(second)
    save_file(tensors | {name: load_file(first)[name]}, second)
    before = Untouched(tmp_path)
    refused(quantize(source, tmp_path / "packed"), 3, f"{name} is stored twice", first.name, second.name)
    before.check()


def test_a_tensor_that_the_model_does_not_know_is_carried_and_named(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors.update({"experts.3.up_porj.weight": torch.ones(3)}))
    result = quantize(source, tmp_path / "packed")
    done(result)
    assert "1 carried, 0 missing (unknown to the model: experts.3.up_porj.weight)" in result.stderr
    assert torch.equal(
        load_file(tmp_path / "packed" / "model.safetensors")["experts.3.up_porj.weight"], torch.ones(3)
    )


def test_a_plan_in_one_line_comes_first_and_what_was_covered_last(source: Path, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "packed", "--verbose")
    done(result)
    told = re.compile(r"plan:|layer \d/\d: weight|source:|coverage:")
    lines = [line for line in result.stderr.splitlines() if told.match(line)]
    assert [line.split(" ")[0] for line in lines] == ["plan:", *["layer"] * 3, "source:", "coverage:"]
    for words in ("bits per weight", "memory about", "disk", "more while it works", "time about"):
        assert words in lines[0]
    assert lines[-2] == "source: 57 tensors read, all finite, no row of zeros"
    assert lines[-1] == "coverage: 57 source tensors, 46 quantized, 11 kept, 0 missing"


@pytest.mark.parametrize(
    "options", [(), ("--target-bpw", "6"), ("--dry-run",)], ids=["bits", "a target", "a dry run"]
)
def test_a_text_is_tokenised_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    texts, genuine = list[object](), sample_windows

    def counted(*arguments: Any, **settings: Any) -> CalibrationSample:
        texts.append(arguments[0])
        return genuine(*arguments, **settings)

    monkeypatch.setattr(collect, "sample_windows", counted)
    done(quantize(source, tmp_path / "packed", *options))
    assert len(texts) == 1


def test_on_a_terminal_the_whole_plan_comes_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    result = quantize(source, tmp_path / "packed")
    assert "Plan for" not in done(result)
    told = result.stderr
    places = [
        told.index(words)
        for words in (
            "source: 1 weight file, 57 tensors, headers and sizes agree",
            "coverage: 57 source tensors",
            "Plan for",
            "routed_experts",
            "memory about",
            "layer 1/3",
            "source: 57 tensors read",
        )
    ]
    assert places == sorted(places)


def test_json_says_nothing_of_it_and_the_bytes_are_the_same(source: Path, tmp_path: Path) -> None:
    done(quantize(source, tmp_path / "told"))
    result = quantize(source, tmp_path / "json", "--json")
    done(result)
    assert result.stderr == ""
    pattern = "*.safetensors"
    assert file_hashes(tmp_path / "told", pattern) == file_hashes(tmp_path / "json", pattern)


def test_rows_of_zeros_are_told_of(source: Path, tmp_path: Path) -> None:
    def clear(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][60:] = 0
        tensors[UP][:] = 0

    change(source, clear)
    result = quantize(source, tmp_path / "packed", "--verbose")
    done(result)
    assert f"20 rows of zeros, in model.embed_tokens.weight (4 of 64), {UP} (all 16)" in result.stderr


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_disk_that_is_too_small_is_refused_before_the_work(
    source: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    with mounted(tmp_path / "disk", "size=40m") as disk:
        refused(quantize(source, disk / "packed", *options), 5, f"{disk} has ", "MB free", "--out")
        assert list(disk.iterdir()) == []


def test_a_read_only_disk_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=100m,ro") as disk:
        refused(quantize(source, disk / "packed"), 5, f"{disk} lies on a read-only file system")


def test_too_little_memory_is_refused_and_little_is_warned_of(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(10**8, 0)
    monkeypatch.setattr("ernieq.convert.preflight.available_memory", lambda: memory)
    refused(quantize(source, tmp_path / "packed"), 7, "100 MB is available", "--windows")
    memory = Memory(5 * 10**8, 0)
    result = quantize(source, tmp_path / "packed")
    done(result)
    assert "memory is tight: 500 MB is available" in result.stderr.splitlines()[0]


def test_a_dry_run_refuses_a_text_that_is_too_short(source: Path, tmp_path: Path) -> None:
    short = write_words(tmp_path / "short.txt", count=5)
    refused(quantize(source, tmp_path / "packed", "--dry-run", "--text", short), 4, "one window of 32")
