"""The bundled model and texts are there, are what their manifests say, and are found in a wheel too."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from ernieq import bundled
from ernieq.errors import TextError, UsageError


def test_the_default_model_is_a_complete_checkpoint_with_provenance() -> None:
    directory = bundled.bundled_model()
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "PROVENANCE.md"} <= names
    assert json.loads((directory / "config.json").read_text())["model_type"] == "ernie4_5_moe"


def test_an_unknown_bundled_model_is_named_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"'ernieq-giant'.*ernieq-nano"):
        bundled.resolve_source("bundled:ernieq-giant")


def test_only_the_bundled_prefix_is_resolved(tmp_path: Path) -> None:
    assert bundled.resolve_source("bundled:ernieq-nano") == bundled.bundled_model("ernieq-nano")
    assert bundled.resolve_source("baidu/ERNIE-4.5-0.3B-PT") == "baidu/ERNIE-4.5-0.3B-PT"
    assert bundled.resolve_source(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "directory", [bundled.calibration_directory(), bundled.evaluation_text("wikitext2").parent]
)
def test_every_text_beside_a_manifest_is_listed_with_its_hash_and_length(directory: Path) -> None:
    texts = bundled.read_manifest(directory)
    assert {text.path for text in texts} == {path for path in directory.iterdir() if path.suffix != ".toml"}
    for text in texts:
        data = text.path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == text.sha256, text.name
        content = data.decode("utf-8")
        if text.path.suffix == ".jsonl":
            content = "".join(json.loads(line)["text"] for line in content.split("\n") if line)
        assert len(content) == text.characters, text.name
        assert text.source, text.name
        assert text.licence, text.name


def test_an_unknown_evaluation_text_is_named_with_those_that_exist() -> None:
    with pytest.raises(TextError, match=r"'wikitext103'.*english_books, wikitext2"):
        bundled.evaluation_text("wikitext103")


def test_an_installed_wheel_finds_its_calibration_texts_inside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "ernieq"
    shutil.copytree(bundled.calibration_directory(), package / "data" / "calib")
    monkeypatch.setattr(bundled, "_PACKAGE", package)
    monkeypatch.setattr(bundled, "_DATA", package / "data")
    assert bundled.calibration_directory() == package / "data" / "calib"
    assert all(text.path.is_relative_to(package) for text in bundled.calibration_texts())


def test_an_installation_without_calibration_texts_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "ernieq")
    monkeypatch.setattr(bundled, "_DATA", tmp_path / "ernieq" / "data")
    with pytest.raises(TextError, match="install ernieq again"):
        bundled.calibration_texts()


@pytest.mark.parametrize(
    "manifest",
    ["[[text]", "text = 3", "[[text]]\nname = 'x'", "", "[[text]]\nname = 'x'\ncharacters = 'many'"],
)
def test_a_broken_manifest_is_refused_by_name(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "manifest.toml").write_text(manifest)
    with pytest.raises(TextError, match=r"manifest\.toml is malformed"):
        bundled.read_manifest(tmp_path)


def test_a_manifest_that_lists_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    entry = "name = 'x'\nfile = 'gone.txt'\nsource = 's'\nlicence = 'l'\nsha256 = '0'\ncharacters = 1\n"
    (tmp_path / "manifest.toml").write_text(f"[[text]]\n{entry}")
    with pytest.raises(TextError, match=r"gone\.txt"):
        bundled.read_manifest(tmp_path)
