"""The fast runtime, on stand-ins for its kernels, against the model's own forward pass."""

import dataclasses
from pathlib import Path

import pytest
import torch

from ernieq.generate.engine import ForwardEngine, RuntimeEngine, make_engine
from ernieq.load import load_model
from ernieq.runtime import PackedRuntime
from tests.decode import fake_kernels
from tests.load.packed_model import DENSE, EVERYTHING, MOE, by_role, write_model


def test_the_runtime_gives_the_logits_of_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "packed", dataclasses.replace(DENSE, head_dim=32), by_role(EVERYTHING))
    fake_kernels.install(monkeypatch)
    truth = ForwardEngine(load_model(tmp_path / "packed", threads=1), 8)
    model = fake_kernels.hold_words(load_model(tmp_path / "packed", threads=1))
    engine = RuntimeEngine(PackedRuntime(model, max_tokens=8))
    logits, expected = engine.prompt([1, 20, 3]), truth.prompt([1, 20, 3])
    for token in (5, 90, 7):
        assert logits.shape == (96,)
        assert float((logits - expected).norm() / expected.norm()) < 1e-2
        logits, expected = engine.step(torch.tensor([token])), truth.step(torch.tensor([token]))


def test_a_model_on_the_cpu_runs_by_its_forward_pass(tmp_path: Path) -> None:
    write_model(tmp_path / "packed", MOE, by_role(EVERYTHING))
    assert isinstance(make_engine(load_model(tmp_path / "packed"), 8), ForwardEngine)
