"""The methods that vLLM calls, on stand-ins for its layers; on a GPU it asks the same of them."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ernieq.errors import UnsupportedModelError
from ernieq.trellis import EncodedMatrix
from tests.decode.encoded_matrices import plain_weight, random_matrix, random_signs
from tests.integrations.test_vllm_slices import stored
from tests.integrations.test_vllm_storage import NAMES, dense_experts, some_experts, some_input, spec_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM in an environment of its own: make test-vllm"
)

HIDDEN, WIDTH, EXPERTS, CHOICES = 64, 48, 4, 2


def expert_layer(experts: list[dict[str, EncodedMatrix]], held: list[int]) -> tuple[Any, Any]:
    """A process that holds some of the experts, loaded as vLLM loads it."""
    from ernieq.integrations.vllm.experts import ErnieqExpertsMethod

    moe = SimpleNamespace(
        activation=SimpleNamespace(value="silu"),
        has_bias=False,
        hidden_dim_unpadded=HIDDEN,
        intermediate_size=WIDTH,
        tp_rank=0,
        tp_size=1,
        max_capture_size=None,
    )
    method = ErnieqExpertsMethod(moe, "e", (spec_of(experts[0]["w1"]), spec_of(experts[0]["w2"])), 1e-12)
    layer: Any = nn.Module()
    local = {expert: place for place, expert in enumerate(held)}
    layer._map_global_expert_id_to_local_expert_id = lambda expert: local.get(expert, -1)
    layer.expert_map = (
        None if len(held) == EXPERTS else torch.tensor([local.get(e, -1) for e in range(EXPERTS)])
    )
    layer.top_k, layer.e_score_correction_bias = CHOICES, torch.tensor([0.0, 0.9, 0.0, 0.0])
    method.create_weights(layer, len(held), HIDDEN, WIDTH, torch.float32)
    for expert, matrices in enumerate(experts):
        for shard, matrix in matrices.items():
            for name, tensor in zip(NAMES, stored(matrix), strict=True):
                parameter = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{name}")
                loaded = parameter.weight_loader(
                    param=parameter,
                    loaded_weight=tensor,
                    weight_name=name,
                    shard_id=shard,
                    expert_id=expert,
                    return_success=True,
                )
                assert loaded == (expert in held)
    method.process_weights_after_loading(layer)
    return method, layer


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0, 2], [1, 3]]])
def test_experts_that_vllm_has_routed_are_the_dense_ones(parts: list[list[int]]) -> None:
    experts, x = some_experts(EXPERTS, HIDDEN, WIDTH), some_input(9, HIDDEN)
    weights, selected = some_input(9, EXPERTS).softmax(-1).topk(CHOICES, dim=-1)
    total = torch.zeros_like(x)
    for held in parts:
        method, layer = expert_layer(experts, held)
        total += method.apply(layer, x, weights, selected.int(), None, None)
    torch.testing.assert_close(total, dense_experts(experts, x, weights, selected), rtol=1e-4, atol=1e-4)


def test_on_a_cpu_the_correction_bias_chooses_and_does_not_weigh() -> None:
    experts, x, logits = some_experts(EXPERTS, HIDDEN, WIDTH), some_input(9, HIDDEN), some_input(9, EXPERTS)
    method, layer = expert_layer(experts, [0, 1, 2, 3])
    assert method.is_monolithic
    probabilities = logits.softmax(-1)
    selected = (probabilities + layer.e_score_correction_bias).topk(CHOICES, dim=-1).indices
    assert (selected == 1).any(dim=1).all()
    weights = probabilities.gather(1, selected)
    weights = weights / weights.sum(1, keepdim=True)
    found = method.apply_monolithic(layer, x, logits)
    torch.testing.assert_close(found, dense_experts(experts, x, weights, selected), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_ernies_is_refused() -> None:
    from ernieq.integrations.vllm.experts import ErnieqExpertsMethod

    moe = SimpleNamespace(activation=SimpleNamespace(value="gelu"), has_bias=False, hidden_dim_unpadded=HIDDEN)
    spec = spec_of(random_matrix(16, 64))
    with pytest.raises(UnsupportedModelError, match=r"^e is not an ERNIE 4\.5 layer"):
        ErnieqExpertsMethod(moe, "e", (spec, spec), 0.0).create_weights(
            nn.Module(), 1, HIDDEN, WIDTH, torch.float32
        )


@pytest.mark.parametrize("rank", range(4))
def test_processes_beyond_the_key_heads_hold_one_of_them_twice(rank: int) -> None:
    from ernieq.integrations.vllm.linear import ErnieqLinearMethod

    signs = random_signs(64)
    heights = {"q": 128, "k": 64, "v": 64}  # four query heads of 32, two key heads
    matrices = {name: random_matrix(rows, 64, 3, signs=signs, seed=rows) for name, rows in heights.items()}
    method = ErnieqLinearMethod({name: spec_of(matrix) for name, matrix in matrices.items()})
    layer: Any = nn.Module()
    layer.tp_rank, layer.tp_size, layer.num_kv_head_replicas = rank, 4, 2
    method.create_weights(layer, 64, [32, 32, 32], 64, 384, torch.float32)
    for shard, matrix in matrices.items():
        for name, tensor in zip(NAMES, stored(matrix), strict=True):
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    x, head = some_input(3, 64), rank // 2
    own = {"q": slice(32 * rank, 32 * rank + 32), "k": slice(32 * head, 32 * head + 32)}
    expected = [x @ plain_weight(matrices[name])[own.get(name, own["k"])].T for name in ("q", "k", "v")]
    torch.testing.assert_close(method.apply(layer, x), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
