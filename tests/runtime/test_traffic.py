"""Bytes that a step reads."""

from __future__ import annotations

import dataclasses

from ernieq.model import ParameterRole, expected_parameters
from ernieq.runtime.traffic import expert_share, step_bytes, step_weights, weight_bytes
from tests.runtime.models import DENSE, SMALL, UNTIED_BIAS


def test_one_token_reads_its_experts_and_all_else_but_an_untied_embedding() -> None:
    for config in (SMALL, UNTIED_BIAS):
        sizes = weight_bytes(config, lambda _name, _spec: 100)
        specs = expected_parameters(config)
        routed = sum(spec.role is ParameterRole.ROUTED_EXPERT for spec in specs.values())
        counted = len(specs) - routed * (1 - config.moe_k / config.moe_num_experts)
        counted -= not config.tie_word_embeddings
        assert step_bytes(config, sizes, batch=1, context=0, cache_bytes=2) == 100 * counted


def test_keys_and_values_of_every_layer_are_read() -> None:
    sizes = weight_bytes(DENSE, lambda _name, _spec: 0)
    found = step_bytes(DENSE, sizes, batch=3, context=7, cache_bytes=2)
    assert found == 3 * 7 * DENSE.num_hidden_layers * 2 * DENSE.num_key_value_heads * DENSE.head_dim * 2


def test_a_larger_batch_reads_more_experts_but_never_more_than_there_are() -> None:
    shares = [expert_share(SMALL, batch) for batch in (1, 2, 8)]
    assert shares == sorted(shares)
    assert shares[0] == SMALL.moe_k / SMALL.moe_num_experts
    assert shares[-1] < 1
    assert expert_share(DENSE, 8) == 0


def test_a_step_of_two_tokens_decodes_twice_the_experts_and_once_the_rest() -> None:
    alone, both = step_weights(SMALL, batch=1), step_weights(SMALL, batch=2)
    layers = SMALL.num_hidden_layers - 1
    experts = layers * SMALL.moe_k * 3 * SMALL.hidden_size * SMALL.moe_intermediate_size
    assert both - alone == experts
    assert step_weights(dataclasses.replace(SMALL, tie_word_embeddings=False), batch=1) == alone
