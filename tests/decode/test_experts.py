"""Packed experts against the model's own."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ernieq.decode import TrellisExperts, TrellisLinear
from ernieq.model import Experts, Mlp, ModelConfig, Routing
from tests.decode.encoded_matrices import plain_weight, random_matrix, random_signs

# A width of whole vectors: the silu of torch rounds the rest of a row otherwise.
HIDDEN, WIDTH, EXPERTS, CHOICES = 64, 96, 6, 2


def config() -> ModelConfig:
    return ModelConfig(
        model_type="ernie4_5_moe",
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        moe_num_experts=EXPERTS,
        moe_k=CHOICES,
        moe_intermediate_size=WIDTH,
    )


def pair(*, shared_signs: bool) -> tuple[TrellisExperts, Experts]:
    """Packed experts, and plain ones with the weights that they decode to."""
    plain, packed = Experts(config()), Experts(config())
    for expert in range(EXPERTS):
        for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            rows, columns = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
            seed = 3 * expert + number
            signs = random_signs(columns, 0 if shared_signs else seed)
            matrix = random_matrix(rows, columns, (1.5, 2, 3.5)[expert % 3], signs=signs, seed=seed)
            setattr(packed[expert], name, TrellisLinear(matrix))
            cast(nn.Linear, getattr(plain[expert], name)).weight = nn.Parameter(
                plain_weight(matrix), requires_grad=False
            )
    return TrellisExperts(cast(Mlp, mlp) for mlp in packed), plain


def routing(tokens: int) -> Routing:
    random = torch.Generator().manual_seed(tokens)
    probabilities = torch.rand(tokens, EXPERTS, generator=random).softmax(-1)
    weights, selected = probabilities.topk(CHOICES, dim=-1)
    return Routing(selected, weights / weights.sum(-1, keepdim=True), probabilities)


def states(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shared_signs", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_packed_experts_equal_plain_ones_with_their_decoded_weights(tokens: int, shared_signs: bool) -> None:
    packed, plain = pair(shared_signs=shared_signs)
    found = packed(states(tokens), routing(tokens))
    torch.testing.assert_close(found, plain(states(tokens), routing(tokens)), rtol=1e-5, atol=1e-4)


def test_a_token_is_rotated_once_for_all_experts_that_share_their_signs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, _ = pair(shared_signs=True)
    widths = []

    def counted(self: TrellisLinear, x: Tensor, rotate=TrellisLinear.rotate) -> Tensor:  # type: ignore[no-untyped-def]
        widths.append(x.shape[-1])
        return cast(Tensor, rotate(self, x))

    monkeypatch.setattr(TrellisLinear, "rotate", counted)
    packed(states(5), routing(5))
    assert widths.count(HIDDEN) == 1


def test_the_output_of_a_token_does_not_depend_on_the_batch() -> None:
    packed, _ = pair(shared_signs=True)
    x, chosen = states(12), routing(12)
    together = packed(x, chosen)
    for token in range(12):
        alone = packed(x[token : token + 1], Routing(*(part[token : token + 1] for part in chosen)))
        assert torch.equal(alone[0], together[token])


def test_an_empty_batch_gives_an_empty_batch() -> None:
    packed, _ = pair(shared_signs=True)
    empty = Routing(
        torch.empty(0, CHOICES, dtype=torch.int64), torch.empty(0, CHOICES), torch.empty(0, EXPERTS)
    )
    assert packed(states(0), empty).shape == (0, HIDDEN)
