"""A tiny ERNIE model as a stream, and a tokenizer of single characters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ernieq.model import DecoderLayer, ErnieForCausalLM, ModelConfig, Rotary

VOCAB = 29


def tiny_config(positions: int, vocab: int) -> ModelConfig:
    """A dense layer and two MoE layers of 6 experts, 2 of which see a token."""
    return ModelConfig(
        model_type="ernie4_5_moe",
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=positions,
        moe_num_experts=6,
        moe_k=2,
        moe_intermediate_size=16,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    )


class TinyStream:
    """Satisfies LayerStream; notes how often the layers were read, and the rows of each chunk of logits."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, seed: int = 0, positions: int = 64, vocab: int = VOCAB, noise: float = 0.0) -> None:
        torch.manual_seed(seed)
        self.config = tiny_config(positions, vocab)
        self.rotary = Rotary(self.config)
        self.model = ErnieForCausalLM(self.config).eval()
        self.passes = 0
        self.head_rows: list[int] = []
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            torch.manual_seed(seed + 1)
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)

    def embed(self, token_ids: Tensor) -> Tensor:
        return torch.as_tensor(self.model.model.embed_tokens(token_ids))

    def layers(self) -> Iterator[DecoderLayer]:
        self.passes += 1
        for layer in self.model.model.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def head(self, hidden: Tensor) -> Tensor:
        self.head_rows.append(len(hidden))
        return torch.as_tensor(self.model.lm_head(self.model.model.norm(hidden)))

    def logits(self, token_ids: Tensor) -> Tensor:
        """(B, T, V), the whole model at once: what the streamed pass must agree with."""
        with torch.no_grad():
            return torch.as_tensor(self.model(token_ids))


class CharacterTokenizer:
    """One token per character, ids 2 and up; knows offsets."""

    is_fast = True

    def __init__(self, bos_token_id: int | None = 1) -> None:
        self.bos_token_id = bos_token_id
        self.calls = 0

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        assert options["add_special_tokens"] is False
        self.calls += 1
        encoded: dict[str, Any] = {"input_ids": [2 + ord(character) % (VOCAB - 2) for character in text]}
        if options.get("return_offsets_mapping"):
            encoded["offset_mapping"] = [(index, index + 1) for index in range(len(text))]
        return encoded


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_stream() -> type[TinyStream]:
    return TinyStream


@pytest.fixture
def make_tokenizer() -> type[CharacterTokenizer]:
    return CharacterTokenizer
