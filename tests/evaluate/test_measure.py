from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ernieq.errors import NonFiniteError, TextError, UsageError
from ernieq.evaluate import Budget, EvaluationText, Protocol, evaluate_stream, evaluate_text, make_windows
from ernieq.evaluate.tokens import tokenize_text

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 12
WINDOW = 32


def windows_of(tokenizer: Any, protocol: Protocol = Protocol.GPTQ, window: int = WINDOW) -> Any:
    return make_windows(tokenize_text(tokenizer, TEXT), protocol, window)


@pytest.mark.parametrize(("protocol", "first"), [(Protocol.GPTQ, 0), (Protocol.LLAMA_CPP, WINDOW // 2)])
def test_losses_equal_cross_entropy_of_the_whole_model(
    make_stream: Any, make_tokenizer: Any, protocol: Protocol, first: int
) -> None:
    stream = make_stream()
    windows = windows_of(make_tokenizer(), protocol)
    logits = stream.logits(windows.token_ids)[:, first:-1]
    expected = F.cross_entropy(
        logits.transpose(1, 2).double(), windows.token_ids[:, first + 1 :], reduction="none"
    )
    nll = evaluate_stream(stream, windows).tokens.nll
    assert nll.shape == tuple(expected.shape)
    torch.testing.assert_close(torch.from_numpy(nll), expected, rtol=1e-5, atol=1e-5)


def test_divergence_equals_brute_force_over_the_vocabulary(make_stream: Any, make_tokenizer: Any) -> None:
    base, measured = make_stream(), make_stream(noise=0.05)
    windows = windows_of(make_tokenizer())
    scores = evaluate_stream(measured, windows, base).tokens
    p = base.logits(windows.token_ids)[:, :-1].double().softmax(-1)
    q = measured.logits(windows.token_ids)[:, :-1].double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)
    assert scores.kl is not None
    assert scores.same_top1 is not None
    assert expected.mean() > 1e-3
    torch.testing.assert_close(torch.from_numpy(scores.kl), expected, rtol=1e-4, atol=1e-6)
    same = (p.argmax(-1) == q.argmax(-1)).numpy()
    assert (scores.same_top1 == same).all()
    assert not same.all()


def test_a_model_does_not_diverge_from_itself(make_stream: Any, make_tokenizer: Any) -> None:
    result = evaluate_stream(make_stream(), windows_of(make_tokenizer()), make_stream())
    assert result.tokens.kl is not None
    assert result.tokens.same_top1 is not None
    assert result.tokens.kl.max() == 0
    assert result.tokens.same_top1.all()
    assert [(row.layer, row.experts_kept, row.load_shift) for row in result.routing] == [(1, 1, 0), (2, 1, 0)]


def test_routing_fidelity_equals_a_count_of_shared_experts(make_stream: Any, make_tokenizer: Any) -> None:
    base, measured = make_stream(), make_stream(noise=0.1)
    windows = windows_of(make_tokenizer())
    chosen = []
    for stream in (base, measured):
        mlp = stream.model.model.layers[1].mlp
        seen: list[torch.Tensor] = []
        handle = mlp.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        stream.logits(windows.token_ids)
        handle.remove()
        chosen.append(mlp.route(seen[0].reshape(-1, 16)).selected.tolist())
    shared = sum(len(set(ours) & set(theirs)) for ours, theirs in zip(*chosen, strict=True))
    row = evaluate_stream(measured, windows, base).routing[0]
    assert row.layer == 1
    assert row.experts_kept == pytest.approx(shared / (2 * len(chosen[0])))
    assert 0 < row.load_shift < row.experts_kept < 1


@pytest.mark.parametrize(
    "budget",
    [
        Budget(batch=1),
        Budget(batch=64),
        Budget(logits_bytes=1),
        Budget(logits_bytes=5000),
        Budget(state_bytes=1),
    ],
)
def test_the_memory_budget_does_not_change_the_result(
    make_stream: Any, make_tokenizer: Any, budget: Budget
) -> None:
    windows = windows_of(make_tokenizer())
    base, measured = make_stream(), make_stream(noise=0.05)
    usual = evaluate_stream(measured, windows, base).tokens
    other = evaluate_stream(measured, windows, base, budget=budget).tokens
    torch.testing.assert_close(torch.from_numpy(usual.kl), torch.from_numpy(other.kl), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(usual.nll), torch.from_numpy(other.nll), rtol=1e-5, atol=1e-6)


def test_the_bound_on_logits_limits_the_tokens_of_each_chunk(make_stream: Any, make_tokenizer: Any) -> None:
    stream = make_stream()
    bound = 3 * 4 * 29 * 7
    evaluate_stream(stream, windows_of(make_tokenizer()), budget=Budget(logits_bytes=bound))
    assert max(stream.head_rows) == 7


def test_layers_are_read_once_unless_the_states_exceed_their_bound(
    make_stream: Any, make_tokenizer: Any
) -> None:
    stream, windows = make_stream(), windows_of(make_tokenizer())
    evaluate_stream(stream, windows)
    assert stream.passes == 1
    evaluate_stream(stream, windows, budget=Budget(state_bytes=WINDOW * 16 * 4 * 10))
    assert stream.passes == 1 + math.ceil(windows.count / 10)


def test_a_layer_is_let_go_before_the_next_one_is_loaded(make_stream: Any, make_tokenizer: Any) -> None:
    stream = make_stream()
    alive: list[int] = []
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def layers() -> Iterator[torch.nn.Module]:
        for layer in stream.model.model.layers:
            gc.collect()
            alive.append(sum(reference() is not None for reference in loaded))
            fresh = copy.deepcopy(layer)
            loaded.append(weakref.ref(fresh))
            yield fresh
            del fresh

    stream.layers = layers
    evaluate_stream(stream, windows_of(make_tokenizer()), make_stream())
    assert alive == [0, 0, 0]


def test_progress_names_every_stage_and_reaches_its_end(make_stream: Any, make_tokenizer: Any) -> None:
    seen: dict[str, tuple[int, int]] = {}
    evaluate_stream(
        make_stream(),
        windows_of(make_tokenizer()),
        make_stream(),
        on_progress=lambda what, done, total: seen.__setitem__(what, (done, total)),
    )
    assert set(seen) == {"layers", "base layers", "logits"}
    assert all(done == total for done, total in seen.values())


def test_non_finite_logits_are_refused(make_stream: Any, make_tokenizer: Any) -> None:
    stream = make_stream()
    with torch.no_grad():
        stream.model.model.norm.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match="logits of the measured model"):
        evaluate_stream(stream, windows_of(make_tokenizer()))


def test_windows_longer_than_the_positions_are_refused(make_stream: Any, make_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="window is 32 tokens; the model has 31 positions"):
        evaluate_stream(make_stream(positions=31), windows_of(make_tokenizer()))


def test_a_base_with_another_vocabulary_is_refused(make_stream: Any, make_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="the base has vocab_size 40; the measured model has 29"):
        evaluate_stream(make_stream(), windows_of(make_tokenizer()), make_stream(vocab=40))


def test_a_text_record_says_what_was_measured(make_stream: Any, make_tokenizer: Any) -> None:
    text = EvaluationText("clocks", TEXT, "abc")
    record = evaluate_text(
        make_stream(), text, make_tokenizer(), protocol=Protocol.LLAMA_CPP, window=WINDOW, max_windows=3
    )
    assert record.text.protocol == "llama.cpp"
    assert record.text.tokens == len(TEXT) + 1
    assert (record.text.windows, record.text.scored_tokens) == (3, 3 * 15)
    assert record.perplexity.bits_per_byte == pytest.approx(record.perplexity.mean_nll / math.log(2))
    assert record.base is None
    assert record.divergence is None
    assert record.routing == ()


def test_a_record_with_a_base_compares_with_it(make_stream: Any, make_tokenizer: Any) -> None:
    text = EvaluationText("clocks", TEXT, "abc")
    record = evaluate_text(
        make_stream(noise=0.05), text, make_tokenizer(), window=WINDOW, base_stream=make_stream()
    )
    assert record.base is not None
    assert record.divergence is not None
    ratio = record.perplexity.perplexity / record.base.perplexity
    assert record.divergence.perplexity_ratio == pytest.approx(ratio)
    assert record.divergence.ratio_interval is not None
    assert record.divergence.ratio_interval.low < ratio < record.divergence.ratio_interval.high


def test_a_text_shorter_than_a_window_is_refused(make_stream: Any, make_tokenizer: Any) -> None:
    with pytest.raises(TextError, match="has 4 tokens; one window of 32 is needed"):
        evaluate_text(make_stream(), EvaluationText("short", "abc", ""), make_tokenizer(), window=WINDOW)
