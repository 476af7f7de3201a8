"""What only a GPU needs, tried on the CPU: narrow layers, streams that lie elsewhere, tokens in segments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ernieq.calibrate import AttentionPass, MlpPass, Streams, mlp, narrow_layer, shared_copy, streams
from ernieq.calibrate.narrow import NarrowLinear, full_context
from ernieq.calibrate.routed import RoutedTokens
from ernieq.checkpoint import load_layer, open_checkpoint
from ernieq.model import Rotary

WINDOWS, LENGTH, HIDDEN = 3, 20, 32
ELSEWHERE = torch.device("cpu", 0)  # equal to no tensor's device, so that streams count as lying elsewhere


def hidden_states(seed: int = 0) -> Tensor:
    return torch.randn(WINDOWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"moe": False, "use_bias": True}], ids=["moe", "biases"])
def test_a_narrow_layer_computes_what_the_wide_one_does(
    tiny: Callable[..., Path], options: dict[str, bool]
) -> None:
    checkpoint = open_checkpoint(tiny(**options))
    wide, narrow = load_layer(checkpoint, 1), load_layer(checkpoint, 1, None)
    narrow_layer(narrow, torch.device("cpu"))
    assert narrow.self_attn.q_proj.weight.dtype is torch.bfloat16
    assert isinstance(narrow.self_attn.q_proj, NarrowLinear)
    if narrow.is_moe:
        assert narrow.mlp.gate.weight.dtype is torch.float32
    rotary = Rotary(checkpoint.config).angles(torch.arange(LENGTH))
    assert torch.equal(narrow(hidden_states(), rotary), wide(hidden_states(), rotary))


def test_the_context_with_repeated_keys_is_that_of_the_attention(tiny: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny())
    layer = load_layer(checkpoint, 1)
    rotary = Rotary(checkpoint.config).angles(torch.arange(LENGTH))
    found = full_context(layer.self_attn, hidden_states(), rotary)
    torch.testing.assert_close(found, layer.self_attn.context(hidden_states(), rotary))


def test_a_shared_copy_takes_no_memory_until_a_weight_is_replaced(tiny: Callable[..., Path]) -> None:
    layer = load_layer(open_checkpoint(tiny()), 1)
    copied = shared_copy(layer)
    weight, other = layer.self_attn.q_proj.weight, copied.self_attn.q_proj.weight
    assert weight.data_ptr() == other.data_ptr()
    before = weight.clone()
    other.data = torch.zeros_like(other)
    assert torch.equal(layer.self_attn.q_proj.weight, before)
    assert not copied.self_attn.q_proj.weight.any()


@pytest.mark.parametrize("segment_tokens", [7, 16, 100])
def test_routed_tokens_are_all_there_in_any_segments(segment_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 5, generator=generator)
    weights, selected = scores.topk(2, dim=1)
    routed = RoutedTokens(selected, weights, 6, segment_tokens)
    for expert in range(6):
        tokens, choice = (selected == expert).nonzero(as_tuple=True)
        found = [
            (chunk[0] + segment.start, chunk[1])
            for number, segment in enumerate(routed.segments)
            for chunk in routed.chunks(expert, number)
        ]
        assert torch.equal(torch.cat([chunk[0] for chunk in found]), tokens)
        assert torch.equal(torch.cat([chunk[1] for chunk in found]), weights[tokens, choice])
        assert routed.count(expert) == len(tokens)


@pytest.mark.parametrize("index", [0, 1])
def test_streams_that_lie_elsewhere_are_worked_off_in_parts_to_the_same_end(
    tiny: Callable[..., Path], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "TOKENS_PER_BATCH", 2 * LENGTH)
    monkeypatch.setattr(mlp, "SEGMENT_TOKENS", 16)
    checkpoint = open_checkpoint(tiny())
    rotary = Rotary(checkpoint.config).angles(torch.arange(LENGTH))
    found = {}
    for worker in (None, ELSEWHERE):
        layer = load_layer(checkpoint, index)
        both = Streams(hidden_states(), hidden_states() + 0.1 * hidden_states(1), worker)
        assert both.resident == (worker is None)
        attention = AttentionPass(layer, layer, both, rotary)
        sums = [attention.input_moments(), attention.context_moments()]
        attention.advance()
        walked = MlpPass(layer, layer, both)
        sums.append(walked.input_moments())
        if layer.is_moe:
            for experts in ((0, 1, 2), (3,)):
                sums += walked.experts_input_moments(experts)
                sums += [moments for pair in walked.experts_down_moments(experts) for moments in pair]
                walked._active = {}  # as on a GPU, which works them out again
                walked.add_experts(experts)
        path = "mlp.shared_experts" if layer.is_moe else "mlp"
        sums.append(walked.down_moments(path))
        walked.advance(path)
        found[worker] = [both.reference, both.quantized]
        found[worker] += [tensor for moments in sums for tensor in (moments.gram, moments.residual)]
    for here, there in zip(found[None], found[ELSEWHERE], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
