"""``ernieq env`` tells what is there, and why the rest is not."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import ernieq
from ernieq.cli import main
from ernieq.kernels.backend import Backend, processor_features, resolve_backend


def env(*options: str) -> str:
    result = CliRunner().invoke(main, ["env", *options])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(env("--json"))
    return found


def test_versions_are_those_that_are_imported() -> None:
    versions = facts()["versions"]
    assert (versions["ernieq"], versions["torch"]) == (ernieq.__version__, torch.__version__)
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_backend_has_no_reason_exactly_if_it_can_be_resolved() -> None:
    reasons = facts()["backends"]
    assert set(reasons) == {backend.value for backend in Backend if backend is not Backend.AUTO} | {"cuda"}
    assert reasons["reference"] == reasons["scalar"] == ""
    assert facts()["auto"]["backend"] == resolve_backend(Backend.AUTO)


def test_features_say_which_instruction_sets_can_run() -> None:
    found = processor_features()
    reasons = facts()["backends"]
    assert facts()["processor"]["features"] == found
    assert (reasons["avx2"] == "") == (found["avx2"] and found["fma"])
    assert (reasons["avx512"] == "") == all(there for name, there in found.items() if "512" in name)


def test_what_the_processor_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    native = SimpleNamespace(
        available_isas=lambda: ["scalar"], processor_features=lambda: {"avx2": False, "fma": True}
    )
    monkeypatch.setattr("ernieq.kernels._native", native)
    shown = env()
    assert "no avx2, fma" in shown
    assert "avx512: no, backend avx512 needs instructions that this processor lacks; it has scalar" in shown
    assert "--backend scalar" in shown


def test_kernels_that_were_not_built_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("ernieq.kernels._native", raising=False)
    monkeypatch.setitem(sys.modules, "ernieq.kernels._native", None)
    found = facts()
    assert "not built" in found["backends"]["scalar"]
    assert found["backends"]["reference"] == ""
    assert found["auto"]["backend"] == "none"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_reason_is_told() -> None:
    reason = facts()["backends"]["cuda"]
    assert reason in ("this torch was built without CUDA", "no NVIDIA GPU was found")
    assert f"GPU        none: {reason}" in env()


def test_a_gpu_is_told_with_its_memory_and_why_it_can_t_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Imagined 1", total_memory=8_000_000_000, major=7, minor=5)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda _index: properties,
        "mem_get_info": lambda _index: (6_000_000_000, 8_000_000_000),
        "get_device_capability": lambda _index: (7, 5),
        "get_device_name": lambda _index: "Imagined 1",
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    (gpu,) = facts()["gpus"]
    assert (gpu["name"], gpu["compute_capability"]) == ("Imagined 1", "7.5")
    assert "has compute capability 7.5; 8.0 (Ampere) or newer is needed" in gpu["unusable"]
    assert "cuda:0     Imagined 1, 8.00 GB (6.00 GB free), compute capability 7.5; not usable: " in env()
