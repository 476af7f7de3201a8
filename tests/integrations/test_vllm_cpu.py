"""Packed checkpoints in vLLM's CPU build against our own runtime: `make test-vllm`, minutes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ernieq.cli import main as ernieq_command
from tests.tiny import TinyOptions, write_tiny

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "vllm_cpu.py"
# Both sum in float32, in another order.
TOLERANCE = 2e-4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="needs vLLM in an environment of its own: make test-vllm",
)


def run_script(*arguments: str) -> str:
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return run.stdout


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``benchmarks/vllm_cpu.py`` measures, once for all tests here."""
    kept = request.config.getoption("--vllm-record", default=None)
    out = Path(kept) if kept else tmp_path_factory.mktemp("vllm") / "figures.json"
    run_script("--out", str(out))
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def agrees(figures: dict[str, Any]) -> bool:
    return bool(
        figures["same"] == figures["greedy_tokens"] and figures["largest_logprob_difference"] < TOLERANCE
    )


@pytest.mark.parametrize(
    "case",
    ["compiled", "two tensor-parallel processes", "two expert-parallel processes", "router bias zero"],
)
def test_vllm_continues_as_our_own_runtime_does(figures: dict[str, Any], case: str) -> None:
    assert agrees(figures["packed"][case])


def test_vllms_own_cpu_router_leaves_the_correction_bias_out(figures: dict[str, Any]) -> None:
    """Fails when they have repaired it; then docs/vllm.md is to say so."""
    plain = figures["not packed, vLLM's own layers"]
    assert agrees(plain["router bias zero"])
    assert plain["router bias as trained"]["largest_logprob_difference"] > 0.1


def test_the_openai_server_answers_with_our_text(figures: dict[str, Any]) -> None:
    answer = figures["server"]
    assert answer["vllm"] == answer["ernieq"]
    assert len(answer["vllm"].split()) > 5


def test_vllm_without_the_plugin_says_that_it_does_not_know_the_method(figures: dict[str, Any]) -> None:
    assert "Unknown quantization method: ernieq" in figures["without the plugin"]


@pytest.mark.parametrize(("moe", "tied"), [(False, True), (False, False), (True, False)])
def test_dense_models_and_heads_of_their_own_agree_too(moe: bool, tied: bool, tmp_path: Path) -> None:
    """And a merged layer, one part of which is not quantized."""
    shape = TinyOptions(moe=moe, tied=tied, hidden=64, heads=2, kv_heads=1, head_dim=32, layers=2)
    source = write_tiny(tmp_path / "source", shape)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 3\n[modules]\n"*.k_proj" = 16\n[encode]\nstate_bits = 12\n')
    packed = tmp_path / "packed"
    command = ["quantize", str(source), "--recipe", str(recipe), "--windows", "2", "--window", "64"]
    ernieq_command([*command, "--out", str(packed), "--device", "cpu"], standalone_mode=False)
    assert agrees(json.loads(run_script("--model", str(packed)).splitlines()[-1]))
