"""What runs on a GPU, with stand-ins for the kernels: which kernel for how many rows, and what comes out."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from ernieq.decode import TrellisEmbedding, TrellisExperts, TrellisHead, TrellisLinear, gpu
from ernieq.errors import BackendUnavailableError, ShapeError
from ernieq.kernels.trellis_matmul.cuda import to_words
from ernieq.model import Mlp, Routing
from tests.decode import fake_kernels
from tests.decode.encoded_matrices import random_matrix, random_signs

BITS = [1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8]
HIDDEN, WIDTH, EXPERTS, CHOICES = 64, 48, 6, 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return fake_kernels.install(monkeypatch)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def some_experts(bits: float, *, alike: bool = True) -> TrellisExperts:
    def linear(rows: int, columns: int, seed: int, name: str) -> TrellisLinear:
        signs = random_signs(columns, 0 if alike or name == "down" else seed)
        return TrellisLinear(random_matrix(rows, columns, bits, signs=signs, seed=seed))

    experts = []
    for expert in range(EXPERTS):
        mlp = Mlp(16, 16, bias=False)
        for number, name in enumerate(("gate_proj", "up_proj")):
            setattr(mlp, name, linear(WIDTH, HIDDEN, 3 * expert + number, "gate"))
        mlp.down_proj = cast(nn.Linear, linear(HIDDEN, WIDTH, 3 * expert + 2, "down"))
        experts.append(mlp)
    return TrellisExperts(experts)


def routing(tokens: int) -> Routing:
    probabilities = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens)).softmax(-1)
    weights, selected = probabilities[:, :-1].topk(CHOICES, dim=-1)  # the last expert has no rows
    return Routing(selected, weights / weights.sum(-1, keepdim=True), probabilities)


def some_states(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bits", BITS)
def test_the_tiles_that_a_moved_weight_gives_back_are_those_that_it_had(bits: float, calls: list[str]) -> None:
    matrix = random_matrix(96, 128, bits)
    weight = TrellisLinear(matrix)
    assert weight.packed_tiles() is weight.packed
    fake_kernels.hold_words(weight)
    assert torch.equal(weight.packed_tiles(), torch.from_numpy(matrix.packed))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "kernel"), [(1, "multiply"), (64, "multiply"), (65, "decode")])
def test_a_product_is_that_of_the_cpu(bits: float, rows: int, kernel: str, calls: list[str]) -> None:
    matrix, bias = random_matrix(96, 128, bits), torch.linspace(-1, 1, 96)
    x = some_states(rows, 128) * 1000
    expected = TrellisLinear(matrix, bias)(x)
    found = fake_kernels.hold_words(TrellisLinear(matrix, bias))(x)
    assert relative_error(found, expected) < 2e-3
    assert calls == ["rotate", kernel]


def test_many_rows_are_multiplied_with_one_part_of_the_matrix_at_a_time(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "BUFFER_BYTES", 2 * 32 * 128)  # two bands of 16 rows
    matrix, x = random_matrix(16 * 5, 128), some_states(100, 128)
    found = fake_kernels.hold_words(TrellisLinear(matrix))(x)
    assert relative_error(found, TrellisLinear(matrix)(x)) < 2e-3
    assert calls.count("decode") == 3


def test_inputs_that_are_rotated_already_are_not_rotated_again(calls: list[str]) -> None:
    matrix, x = random_matrix(32, 64), some_states(2, 3, 64)
    plain, held = TrellisLinear(matrix), fake_kernels.hold_words(TrellisLinear(matrix))
    assert relative_error(held.forward_rotated(plain.rotate(x)), plain(x)) < 2e-3
    assert calls == ["multiply"]


def test_a_row_of_zeros_gives_zeros_and_no_rows_give_none(calls: list[str]) -> None:
    linear = fake_kernels.hold_words(TrellisLinear(random_matrix(32, 64)))
    assert torch.equal(linear(torch.zeros(2, 64)), torch.zeros(2, 32))
    assert torch.equal(linear.forward_rotated(torch.zeros(2, 64)), torch.zeros(2, 32))
    assert linear(torch.zeros(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("bits", BITS)
def test_looked_up_and_decoded_rows_have_the_bits_of_the_cpu(bits: float, calls: list[str]) -> None:
    matrix = random_matrix(16 * 100, 64, bits)
    ids = torch.tensor([[0, 15, 16, 700, 700], [1599, 3, 1024, 1023, 0]])
    plain, held = TrellisEmbedding(matrix), fake_kernels.hold_words(TrellisEmbedding(matrix))
    assert torch.equal(held(ids), plain(ids))
    assert torch.equal(held.decode_rows(slice(16, 48)), plain.decode_rows(slice(16, 48)))
    with pytest.raises(ShapeError, match="multiples of 16"):
        held.decode_rows(slice(8, 48))


def test_a_tied_head_multiplies_with_the_words_of_the_table(calls: list[str]) -> None:
    matrix, hidden = random_matrix(160, 64, 4), some_states(2, 3, 64)
    expected = TrellisHead(TrellisEmbedding(matrix), torch.ones(160))(hidden)
    head = fake_kernels.hold_words(TrellisHead(TrellisEmbedding(matrix), torch.ones(160)))
    assert relative_error(head(hidden), expected) < 2e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("tokens", "kernel"),
    [(1, "multiply_selected"), (8, "multiply_selected"), (9, "multiply_grouped"), (500, "decode")],
)
def test_experts_compute_what_they_do_on_the_cpu(
    bits: float, tokens: int, kernel: str, calls: list[str]
) -> None:
    x, chosen = some_states(tokens, HIDDEN), routing(tokens)
    expected = some_experts(bits)(x, chosen)
    experts = fake_kernels.hold_words(some_experts(bits))
    assert experts.stacked
    assert relative_error(experts(x, chosen), expected) < 2e-3
    assert calls.count(kernel) == 2
    assert not {"decode", "multiply_selected", "multiply_grouped", "multiply"} - {kernel} & set(calls)


def test_a_few_experts_are_decoded_at_a_time(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BUFFER_BYTES", 2 * 4 * 3 * WIDTH * HIDDEN)  # four experts
    x, chosen = some_states(500, HIDDEN), routing(500)
    experts = fake_kernels.hold_words(some_experts(2))
    assert relative_error(experts(x, chosen), some_experts(2)(x, chosen)) < 2e-3
    assert calls.count("decode") == 4


def test_experts_that_differ_in_their_signs_run_one_by_one(calls: list[str]) -> None:
    x, chosen = some_states(7, HIDDEN), routing(7)
    experts = fake_kernels.hold_words(some_experts(3, alike=False))
    assert not experts.stacked
    assert relative_error(experts(x, chosen), some_experts(3, alike=False)(x, chosen)) < 2e-3


def test_the_stack_holds_the_experts_once_and_each_is_a_view_of_it(calls: list[str]) -> None:
    before, experts = some_experts(3), fake_kernels.hold_words(some_experts(3))
    assert experts.gate_up_words.shape == (EXPERTS, 2 * WIDTH // 16, HIDDEN // 16, 24)
    assert experts.down_words.shape == (EXPERTS, HIDDEN // 16, WIDTH // 16, 24)
    assert experts.gate_up_scale.shape == (EXPERTS, 2 * WIDTH)
    for expert, (old, new) in enumerate(zip(before, experts, strict=True)):
        for name, whole, first in (
            ("gate_proj", experts.gate_up_words, 0),
            ("up_proj", experts.gate_up_words, WIDTH // 16),
            ("down_proj", experts.down_words, 0),
        ):
            was, now = getattr(old, name), getattr(new, name)
            assert now.packed is None
            assert torch.equal(now.words, to_words(was.packed))
            assert now.words.data_ptr() == whole[expert, first].data_ptr()
            assert torch.equal(now.decode_rows(), was.decode_rows())
    sizes = {
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in experts.buffers()
    }
    packed = sum(buffer.nbytes for buffer in before.buffers())
    assert sum(sizes.values()) <= packed  # signs, which all share, are held once


def test_no_tokens_give_no_outputs(calls: list[str]) -> None:
    experts = fake_kernels.hold_words(some_experts(2))
    none = Routing(torch.empty(0, CHOICES, dtype=torch.int64), torch.empty(0, CHOICES), torch.empty(0, EXPERTS))
    assert experts(torch.empty(0, HIDDEN), none).shape == (0, HIDDEN)


def test_a_conversion_leaves_the_stack_as_it_is(calls: list[str]) -> None:
    experts = fake_kernels.hold_words(some_experts(2)).bfloat16()
    assert experts.gate_up_scale.dtype is torch.float16
    x = some_states(3, HIDDEN).bfloat16()
    assert experts(x, routing(3)).dtype is torch.bfloat16


def test_a_move_to_anything_but_a_gpu_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="can't be moved to device meta"):
        some_experts(2).to("meta")
