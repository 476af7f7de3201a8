"""What ``quantization_config`` says about vLLM's merged layers."""

from __future__ import annotations

from typing import Any

import pytest

from ernieq.errors import FormatError, UnsupportedModelError
from ernieq.integrations.vllm.modules import PackedModules

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
EXPERTS = "model.layers.1.mlp.experts"


def config(**modules: float) -> dict[str, Any]:
    entries = {name: {"bits": bits, "rotation_block": 64} for name, bits in modules.items()}
    return {"quant_method": "ernieq", "format_version": "0.2", "state_bits": 16, "modules": entries}


def bits(parts: dict[str, Any]) -> list[float | None]:
    return [spec and spec.code.bits_per_weight for spec in parts.values()]


def test_the_parts_of_a_merged_layer_keep_their_own_rates() -> None:
    modules = PackedModules(config(**{"a.0-3.q_proj": 4, "a.0-3.k_proj": 4, "a.0-3.v_proj": 4.5}))
    parts = modules.parts("a.2.qkv_proj", MERGED)
    assert list(parts) == ["a.2.q_proj", "a.2.k_proj", "a.2.v_proj"]
    assert bits(parts) == [4, 4, 4.5]


def test_a_part_that_is_not_quantized_has_no_code() -> None:
    modules = PackedModules(config(**{"a.gate_proj": 2}))
    assert bits(modules.parts("a.gate_up_proj", MERGED)) == [2, None]
    assert bits(modules.parts("a.down_proj", MERGED)) == [None]
    assert bits(modules.parts("gate_proj", MERGED)) == [None]


def test_experts_that_are_alike_have_one_code_per_product() -> None:
    pair = PackedModules(
        config(
            **{
                f"{EXPERTS}.0-3.gate_proj": 2,
                f"{EXPERTS}.0-3.up_proj": 2,
                f"{EXPERTS}.0-3.down_proj": 2.5,
            }
        )
    ).experts(EXPERTS, 4)
    assert pair is not None
    assert [spec.code.bits_per_weight for spec in pair] == [2, 2.5]


def test_experts_that_are_not_quantized_are_left_to_vllm() -> None:
    assert PackedModules(config(**{"a.q_proj": 2})).experts(EXPERTS, 4) is None


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({f"{EXPERTS}.3.gate_proj": 3}, "3 bits"),
        ({f"{EXPERTS}.3.gate_proj": 2}, ""),
        ({}, "no packed weight"),
    ],
)
def test_one_expert_that_differs_is_named(changed: dict[str, float], found: str) -> None:
    alike = {f"{EXPERTS}.0-2.gate_proj": 2, f"{EXPERTS}.0-3.up_proj": 2, f"{EXPERTS}.0-3.down_proj": 2}
    modules = PackedModules(config(**alike, **changed))
    if not found:
        assert modules.experts(EXPERTS, 4) is not None
        return
    with pytest.raises(UnsupportedModelError, match=rf"3\.gate_proj has {found} and .*0\.gate_proj 2 bits"):
        modules.experts(EXPERTS, 4)


def test_another_format_version_is_refused_in_one_sentence() -> None:
    raw = config(**{"a.q_proj": 2}) | {"format_version": "0.9"}
    with pytest.raises(FormatError, match=r"config\.json has format version '0\.9'; this ernieq reads"):
        PackedModules(raw)
