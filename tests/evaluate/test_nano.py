"""The bundled model, measured layer by layer, against transformers running it whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ernieq.bundled import bundled_model
from ernieq.checkpoint import load_tokenizer
from ernieq.evaluate import Protocol, evaluate_stream, load_text, make_windows, tokenize_text
from ernieq.load import open_stream

WINDOW = 192


@pytest.mark.parametrize("protocol", list(Protocol))
def test_losses_of_nano_equal_those_of_transformers(protocol: Protocol) -> None:
    directory = bundled_model()
    tokens = tokenize_text(load_tokenizer(directory), load_text("wikitext2", max_bytes=4000).text)
    windows = make_windows(tokens, protocol, WINDOW, max_windows=3)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = whole(windows.token_ids).logits[:, windows.first_scored : -1]
    expected = F.cross_entropy(
        logits.transpose(1, 2), windows.token_ids[:, windows.first_scored + 1 :], reduction="none"
    )
    found = torch.from_numpy(evaluate_stream(open_stream(directory), windows).tokens.nll).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert float(found.mean()) == pytest.approx(float(expected.mean()), abs=1e-4)
