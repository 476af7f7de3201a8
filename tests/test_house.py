"""The rules that the project as a whole keeps: its tree, its ladder, its pins, and nothing of one machine."""

from __future__ import annotations

import fnmatch
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import ernieq

ROOT = Path(__file__).resolve().parent.parent
CODE_SUFFIXES = {".py", ".cpp", ".hpp", ".inl", ".cu"}
LONGEST_SOURCE_FILE = 350  # lines; the aim is 300
LARGEST_FILE = 2_000_000  # bytes; only the bundled model may be larger


def project_files() -> list[Path]:
    """All files of the project, relative to its root: what is there and not named in .gitignore."""
    patterns = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()]

    def kept(name: str) -> bool:
        return name != ".git" and not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    found = []
    for folder, folder_names, names in os.walk(ROOT):
        folder_names[:] = [name for name in folder_names if kept(name)]
        found += [(Path(folder) / name).relative_to(ROOT) for name in names if kept(name)]
    return sorted(found)


def readme_block(heading: str) -> list[str]:
    """Lines of the first fenced block under a heading of the README."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    return section.split("```\n")[1].splitlines()


def readme_tree() -> dict[Path, str]:
    """The README's file tree: path relative to the root -> what is said of it."""
    entries: dict[Path, str] = {}
    folders: list[str] = []
    for line in readme_block("File tree"):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, description = line.strip().partition(" ")
        folders = [*folders[:depth], name]
        entries[Path(*folders)] = description.strip()
    return entries


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def readable_text(path: Path) -> str | None:
    """A file's text, or None for a binary file."""
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_everything_in_the_readme_tree_exists_and_is_described() -> None:
    tree = readme_tree()
    assert {str(path) for path in tree if not (ROOT / path).exists()} == set()
    assert {str(path) for path, description in tree.items() if not description} == set()


def test_every_folder_of_the_project_is_in_the_readme_tree() -> None:
    folders = {parent for path in project_files() for parent in path.parents if parent != Path()}
    mirrors = {
        Path("tests") / folder.relative_to("ernieq") for folder in folders if folder.parts[0] == "ernieq"
    }
    test_data = {folder for folder in folders if folder.parts[0] == "tests" and len(folder.parts) > 2}
    assert {str(folder) for folder in folders - mirrors - test_data - set(readme_tree())} == set()


def test_the_readme_prints_the_import_ladder_that_is_enforced() -> None:
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert readme_block("Import ladder") == [re.sub(r"[()]", "", layer) for layer in layers]


def test_every_test_folder_mirrors_a_package_or_is_named_in_the_readme_tree() -> None:
    folders = {
        path.parent for path in project_files() if path.parts[0] == "tests" and path.name.startswith("test_")
    }
    unknown = {
        str(folder)
        for folder in folders - set(readme_tree())
        if not (ROOT / "ernieq" / folder.relative_to("tests")).is_dir()
    }
    assert unknown == set()


def test_no_file_names_a_path_of_one_machine() -> None:
    # In pieces, so that this file passes its own check.
    machine_path = re.compile(
        "|".join(["/wo" + "rk/", "/fa" + "rm/", "/tmp/bash" + "_jobs", "/opt/" + "(?:wheels|pypi)"])
    )
    named = {str(path) for path in project_files() if machine_path.search(readable_text(path) or "")}
    assert named == set()


def test_no_source_file_has_grown_beyond_one_job() -> None:
    lines = {
        str(path): (readable_text(path) or "").count("\n")
        for path in project_files()
        if path.suffix in CODE_SUFFIXES
    }
    assert {path: count for path, count in lines.items() if count > LONGEST_SOURCE_FILE} == {}


def test_no_source_file_is_left_unfinished() -> None:
    mark = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")
    marked = {
        str(path)
        for path in project_files()
        if path.suffix in CODE_SUFFIXES and mark.search(readable_text(path) or "")
    }
    assert marked == set()


def test_only_the_bundled_model_is_large() -> None:
    large = {path for path in project_files() if (ROOT / path).stat().st_size > LARGEST_FILE}
    assert large == {Path("ernieq/data/ernieq-nano/model.safetensors")}


def test_the_package_and_its_metadata_agree_on_the_version() -> None:
    assert ernieq.__version__ == pyproject()["project"]["version"]


def test_every_direct_requirement_is_pinned() -> None:
    project = pyproject()
    requirements = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
        *project["project"]["optional-dependencies"]["docs"],
    ]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in pins if "==" in line}
    assert {name for name in map(normalised, requirements) if name not in pinned} == set()


def test_a_wheel_puts_the_calibration_texts_where_they_are_looked_for() -> None:
    rules = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "install(DIRECTORY calib/ DESTINATION ernieq/data/calib)" in rules


def test_an_editable_install_looks_for_modules_in_no_folder_but_the_package() -> None:
    assert {Path(place).name for place in ernieq.__path__} == {"ernieq"}


@pytest.mark.parametrize("path", [".ci/run", ".ci/test_transformers"])
def test_scripts_can_be_run(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK)


def normalised(requirement: str) -> str:
    """A requirement's package name as the packaging standard compares it."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()
