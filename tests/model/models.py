"""The same checkpoint twice: as ernieq's model, and as transformers', which is the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ernieq.checkpoint import open_checkpoint
from ernieq.model import ErnieForCausalLM, expected_parameters

NANO = Path(__file__).resolve().parents[2] / "ernieq" / "data" / "ernieq-nano"


def our_model(directory: Path) -> ErnieForCausalLM:
    checkpoint = open_checkpoint(directory)
    state = {
        name: checkpoint.parameter(name, spec, torch.float32)
        for name, spec in expected_parameters(checkpoint.config).items()
    }
    with torch.device("meta"):
        model = ErnieForCausalLM(checkpoint.config)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def their_model(directory: Path) -> Any:
    loader: Any = AutoModelForCausalLM
    model, report = loader.from_pretrained(str(directory), dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def tokens_for(model: ErnieForCausalLM, batch: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
