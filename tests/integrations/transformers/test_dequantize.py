"""A dequantized model is transformers' own, with the weights that ``ernieq export`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ernieq.convert.export import export_bf16
from ernieq.integrations.transformers.modules import PackedMatrix
from ernieq.model import ModelConfig
from tests.integrations.transformers.packed_checkpoints import load, logits, write_packed
from tests.load.test_load_model import CASES


@pytest.mark.parametrize(("config", "chosen"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_dequantized_model_equals_the_export_and_needs_no_ernieq(
    config: ModelConfig, chosen: Any, tmp_path: Path
) -> None:
    packed = write_packed(tmp_path / "packed", config, chosen)
    export_bf16(packed, tmp_path / "exported", threads=1)
    model = load(packed, torch.bfloat16).dequantize()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.bfloat16)
    found, truth = model.state_dict(), expected.state_dict()
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert torch.equal(logits(model), logits(expected))
    assert not any(isinstance(module, PackedMatrix) for module in model.modules())
    assert model.dtype is torch.bfloat16
    assert all(parameter.requires_grad for parameter in model.parameters())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied is config.tie_word_embeddings


def test_a_dequantized_model_is_saved_as_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = load(write_packed(tmp_path / "packed"), torch.bfloat16).dequantize()
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert getattr(again.config, "quantization_config", None) is None
    assert again.dtype is torch.bfloat16
    assert isinstance(again.model.layers[0].self_attn.q_proj, nn.Linear)
    assert torch.equal(logits(again), logits(model))


def test_another_dtype_can_be_asked_for_and_leaves_the_router_alone(tmp_path: Path) -> None:
    model = load(write_packed(tmp_path / "packed"), torch.float32)
    before = logits(model)
    model = model.dequantize(torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes.pop("model.layers.1.mlp.gate.weight") is torch.float32
    assert dtypes.pop("model.layers.1.mlp.gate.moe_statics.e_score_correction_bias") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert float((logits(model) - before).norm() / before.norm()) < 0.05
