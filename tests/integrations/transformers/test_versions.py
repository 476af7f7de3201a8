"""The declared range of transformers is the same everywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import transformers

from ernieq.errors import BackendUnavailableError
from ernieq.integrations.transformers.versions import check_version, requirement

ROOT = Path(__file__).resolve().parents[3]


def test_pyproject_declares_the_range_that_is_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert requirement() in project["optional-dependencies"]["transformers"]


def test_the_version_that_these_tests_run_with_is_in_the_range() -> None:
    check_version(transformers.__version__)


@pytest.mark.parametrize("version", ["5.16.1", "5.20.2", "5.24.0", "5.24.3.dev0", "5.17"])
def test_versions_in_the_range_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["5.16.0", "5.25.0", "5.25.0rc1", "4.57.6", "6.0.0", "unknown"])
def test_versions_out_of_it_are_refused(version: str) -> None:
    with pytest.raises(BackendUnavailableError, match="brings one that can"):
        check_version(version)
