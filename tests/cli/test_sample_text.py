"""A model writes text for its own calibration: the file, its use by quantize, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernieq.cli import sample_text
from ernieq.errors import BackendUnavailableError
from ernieq.pack import PackedReader
from tests.cli.quantizing import CODE, SAMPLE, done, refused, run
from tests.convert.conversions import file_hashes

Tiny = Callable[..., Path]
CPU = ["--device", "cpu", "--threads", "1"]


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_seed_decides_the_text(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        out = tmp_path / f"{name}.jsonl"
        done(run("sample-text", source, "--out", out, "--tokens", "300", "--seed", seed, *CPU))
    one, again, two = (documents(tmp_path / f"{name}.jsonl") for name in ("one", "again", "two"))
    assert one == again != two
    assert all(len(text) > 0 for text in one)


def test_low_temperature_makes_the_text_less_varied(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    for name, temperature in (("cold", "0.01"), ("warm", "1")):
        options = ("--out", str(tmp_path / name), "--tokens", "300", "--temperature", temperature, *CPU)
        done(run("sample-text", source, *options))
    cold, warm = ("".join(documents(tmp_path / name)).split() for name in ("cold", "warm"))
    assert len(set(cold)) / len(cold) < len(set(warm)) / len(warm)


def test_an_existing_file_is_replaced_only_if_asked(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny(), tmp_path / "own.jsonl"
    out.write_text("mine")
    refused(run("sample-text", source, "--out", out, "--tokens", "50", *CPU), 2, str(out), "--overwrite")
    assert out.read_text() == "mine"
    done(run("sample-text", source, "--out", out, "--tokens", "50", "--overwrite", *CPU))
    assert documents(out)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_quantize_calibrates_on_the_model_s_own_text_and_uses_it_again(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny(), tmp_path / "packed"
    first = run("quantize", source, "--out", out, "--own-text", *CODE, *SAMPLE)
    done(first)
    own = tmp_path / "packed-text.jsonl"
    assert f"{own}, written by the model itself" in first.stderr
    calibration = PackedReader(out).manifest.calibration
    assert calibration is not None
    assert [Path(name).name for name in calibration.files] == [own.name]
    before = own.read_bytes()
    again = run("quantize", source, "--out", tmp_path / "packed", "--own-text", "--overwrite", *CODE, *SAMPLE)
    done(again)
    assert "an earlier command let the model write" in again.stderr
    assert own.read_bytes() == before
    done(run("quantize", source, "--out", tmp_path / "given", "--text", own, *CODE, *SAMPLE))
    assert file_hashes(out, "*.safetensors") == file_hashes(tmp_path / "given", "*.safetensors")


def test_own_text_beside_another_text_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("words")
    result = run("quantize", tiny(), "--out", tmp_path / "packed", "--own-text", "--text", text, *CODE)
    refused(result, 2, "--own-text", "--text")


@pytest.mark.parametrize("wanted", [None, True])
def test_a_gpu_without_room_for_the_model_is_said_and_only_an_explicit_wish_fails(
    wanted: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> int:
        raise BackendUnavailableError("the GPU has too little memory")

    monkeypatch.setattr(sample_text, "write_own_text", no_room)
    lines: list[str] = []

    class Progress:
        line = staticmethod(lines.append)

    from ernieq.convert import default_recipe

    arguments = (tmp_path, tmp_path / "packed", default_recipe(2), torch.device("cuda"), Progress())
    if wanted:
        with pytest.raises(BackendUnavailableError):
            sample_text.own_text(*arguments, wanted=wanted)  # type: ignore[arg-type]
        return
    assert sample_text.own_text(*arguments, wanted=wanted) == ()  # type: ignore[arg-type]
    assert "bundled texts" in lines[0]
    assert "too little memory" in lines[0]
