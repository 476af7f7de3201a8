"""What vLLM finds of us, and what it is told if it is another vLLM than the plugin needs."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import entry_points
from types import ModuleType

import pytest

from ernieq.integrations import vllm as plugin

GROUP = "vllm.general_plugins"


def test_vllm_finds_the_plugin_by_its_entry_point() -> None:
    (found,) = (point for point in entry_points(group=GROUP) if point.name == "ernieq")
    assert found.load() is plugin.register


def test_the_plugin_is_imported_without_vllm() -> None:
    assert "vllm" not in vars(plugin)
    if importlib.util.find_spec("vllm") is None:
        assert not [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]


def test_an_older_vllm_is_told_in_one_sentence_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    older = ModuleType("vllm.model_executor.layers.quantization")
    older.register_quantization_config = lambda name: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, older.__name__, older)
    monkeypatch.delitem(sys.modules, "ernieq.integrations.vllm.config", raising=False)
    plugin.register()
    (record,) = caplog.records
    assert record.getMessage().startswith("ernieq's plugin is for vLLM 0.32 and 0.33 and can't use this one (")
    assert "install that vLLM" in record.getMessage()
    assert record.exc_info is None
