"""Importing ernieq teaches transformers the format, whichever comes first, and costs next to nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers.quantizers import auto

from ernieq.integrations.transformers import hook
from ernieq.integrations.transformers.config import ErnieqConfig
from ernieq.integrations.transformers.quantizer import ErnieqQuantizer
from tests.integrations.transformers.packed_checkpoints import write_packed

FAKE_LIST = "fake_list_of_methods"


@pytest.fixture
def fake_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that is not imported yet, in the place of transformers' list of methods."""
    (tmp_path / f"{FAKE_LIST}.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(hook, "METHODS_MODULE", FAKE_LIST)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not is_ours(finder)])
    monkeypatch.delitem(sys.modules, FAKE_LIST, raising=False)
    return FAKE_LIST


def is_ours(finder: Any) -> bool:
    return type(finder).__module__ == hook.__name__


def test_the_method_is_registered_when_the_list_is_imported(
    fake_list: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[ModuleType] = []
    monkeypatch.setattr(hook, "register", registered.append)
    hook.register_when_imported()
    hook.register_when_imported()  # a second import of ernieq adds no second finder
    assert sum(map(is_ours, sys.meta_path)) == 1
    assert importlib.util.find_spec(fake_list) is not None  # looking for it is not importing it
    assert not registered
    module = importlib.import_module(fake_list)
    assert registered == [module]
    assert module.loaded


def test_the_method_is_registered_at_once_when_the_list_is_there(
    fake_list: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[ModuleType] = []
    monkeypatch.setattr(hook, "register", registered.append)
    module = importlib.import_module(fake_list)
    hook.register_when_imported()
    assert registered == [module]
    assert not any(map(is_ours, sys.meta_path))


def test_registering_twice_changes_nothing() -> None:
    hook.register(auto)
    hook.register(auto)
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[hook.METHOD] is ErnieqConfig
    assert auto.AUTO_QUANTIZER_MAPPING[hook.METHOD] is ErnieqQuantizer


def test_a_transformers_without_such_lists_is_warned_of_and_stays_usable() -> None:
    with pytest.warns(UserWarning, match=r"AUTO_QUANTIZATION_CONFIG_MAPPING.*; pip install 'transformers>="):
        hook.register(ModuleType("lists_of_another_name"))


def test_importing_ernieq_brings_in_neither_and_a_later_transformers_loads_a_packed_model(
    tmp_path: Path,
) -> None:
    write_packed(tmp_path / "packed")
    script = f"""
import sys
import ernieq
assert not {{"torch", "transformers", "numpy", "safetensors"}} & set(sys.modules), "ernieq is light"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "packed")!r})
print(type(model.model.layers[1].mlp.experts).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["PackedExperts"], done.stderr
