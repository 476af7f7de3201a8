"""Packed checkpoints for transformers' loader, and what a test compares of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ernieq
from ernieq.model import ModelConfig
from tests.load.packed_model import EVERYTHING, MOE, by_role, write_model
from tests.tiny import write_tokenizer

assert ernieq.__version__  # importing ernieq is what makes transformers load these
TOKENS = torch.tensor([[1, 90, 3, 17, 17, 2, 64], [5, 6, 7, 8, 9, 10, 95]])
CARD = "# a model card\n"


def write_packed(directory: Path, config: ModelConfig = MOE, chosen: Any = None) -> Path:
    """A packed checkpoint with a tokenizer and a card; all of the model is quantized by default."""
    write_model(directory, config, chosen or by_role(EVERYTHING))
    write_tokenizer(directory, config.vocab_size)
    (directory / "README.md").write_text(CARD)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(TOKENS.to(model.device)).logits
    return found.float().cpu()


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )
