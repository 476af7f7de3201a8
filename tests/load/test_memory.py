"""Memory of a process that loads a packed model and uses all of it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load.packed_model import DENSE, EVERYTHING, by_role, write_model

_MEASURE = """
import sys, torch
from ernieq.load import load_model

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) * 1024

torch.set_num_threads(1)
load_model(sys.argv[1], threads=1)(torch.tensor([[1]]))  # what the libraries allocate once
before = resident()
model = load_model(sys.argv[2], threads=1)
with torch.inference_mode():
    model(torch.tensor([[1]]))
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_a_packed_model_in_use_takes_about_the_memory_of_its_file(tmp_path: Path) -> None:
    config = dataclasses.replace(
        DENSE, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, head_dim=64, vocab_size=2048
    )
    write_model(tmp_path / "small", DENSE, by_role(EVERYTHING))
    weights = write_model(tmp_path / "packed", config, by_role(EVERYTHING))
    in_bf16 = sum(2 * weight.numel() for weight in weights.values())
    in_file = (tmp_path / "packed" / "model.safetensors").stat().st_size
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "packed")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(measured.stdout)
    assert in_file * 0.9 < grown < in_file * 1.15 + 4e6  # 4 MB: buffers of one forward pass
    assert grown < in_bf16 / 2
