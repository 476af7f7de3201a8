"""Models loaded to a GPU, whole and as a stream, against the same on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ernieq.generate import GenerateOptions, generate_tokens
from ernieq.load import ModelStream, load_model, open_stream
from ernieq.model import ErnieForCausalLM, KVCache
from tests.load.packed_model import DENSE, EVERYTHING, MOE, by_role, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TOKENS = torch.tensor([[1, 20, 3, 17, 17, 2, 63], [5, 6, 31, 8, 9, 10, 62]])
CONFIGS = {
    "moe": MOE,
    "dense": DENSE,
    "untied": dataclasses.replace(MOE, tie_word_embeddings=False, use_bias=True),
}


@pytest.fixture(params=[*CONFIGS, "plain"])
def directory(request: pytest.FixtureRequest, tmp_path: Any, tiny: Any) -> Any:
    if request.param == "plain":
        return tiny()
    write_model(tmp_path / "packed", CONFIGS[request.param], by_role(EVERYTHING))
    return tmp_path / "packed"


def logits(model: ErnieForCausalLM) -> torch.Tensor:
    device = next(model.parameters()).device
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS.to(device))
    return found.cpu()


def test_a_model_on_a_gpu_computes_what_it_does_on_the_cpu(directory: Any) -> None:
    expected = logits(load_model(directory))
    for device in ("cuda", "auto", "cuda:0"):
        model = load_model(directory, device=device)
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
        found = logits(model)
        assert float((found - expected).norm() / expected.norm()) < 5e-3


def test_half_precision_is_taken_for_what_is_not_packed(directory: Any) -> None:
    expected = logits(load_model(directory))
    found = logits(load_model(directory, device="cuda", dtype=torch.bfloat16))
    errors = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()  # of every token
    # bfloat16 on the CPU: 0.006 to 0.025. Two experts of one token are so near each other that a rounding
    # decides between them; with the other one its logits are off by 0.39, and those of all tokens by 0.105.
    assert float(errors.median()) < 0.03
    assert int((errors > 0.05).sum()) <= 1


def test_tokens_one_by_one_with_a_cache_equal_all_at_once(directory: Any) -> None:
    model = load_model(directory, device="cuda")
    cache = KVCache(model.config, batch=2, max_tokens=7, device="cuda")
    with torch.inference_mode():
        steps = torch.cat([model(TOKENS[:, [place]].cuda(), cache) for place in range(7)], dim=1)
    expected = logits(model)
    assert float((steps.cpu() - expected).norm() / expected.norm()) < 5e-3


def test_a_stream_on_a_gpu_computes_what_the_model_does(directory: Any) -> None:
    def run(stream: ModelStream) -> torch.Tensor:
        with torch.inference_mode():
            hidden = stream.embed(TOKENS)
            rotary = stream.rotary.angles(torch.arange(TOKENS.shape[1], device=hidden.device))
            for layer in stream.layers():
                hidden = layer(hidden, rotary)
            return stream.head(hidden.flatten(0, 1)).cpu()

    expected = run(open_stream(directory))
    found = run(open_stream(directory, device="cuda"))
    assert float((found - expected).norm() / expected.norm()) < 5e-3


def test_tokens_are_generated_on_a_gpu_and_a_seed_fixes_them(directory: Any) -> None:
    model = load_model(directory, device="cuda")
    options = GenerateOptions(max_tokens=12, temperature=1.0, seed=3)
    first, again = (list(generate_tokens(model, [1, 9, 30], options)) for _ in range(2))
    assert first == again
    assert len(first) == 12
    assert max(first) < model.config.vocab_size
