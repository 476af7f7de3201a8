"""Packed modules on a GPU against the same on the CPU."""

from __future__ import annotations

import pytest
import torch

from ernieq.decode import TrellisEmbedding, TrellisHead, TrellisLinear
from ernieq.errors import BackendUnavailableError
from tests.decode.encoded_matrices import random_matrix
from tests.decode.test_gpu_paths import BITS, HIDDEN, relative_error, routing, some_experts, some_states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 9, 64, 65, 300])
def test_a_product_is_that_of_the_cpu(bits: float, rows: int) -> None:
    matrix, bias = random_matrix(96, 2560, bits), torch.linspace(-1, 1, 96)
    x = some_states(rows, 2560) * 1000
    expected = TrellisLinear(matrix, bias)(x)
    linear = TrellisLinear(matrix, bias).to("cuda")
    assert relative_error(linear(x.cuda()).cpu(), expected) < 2e-3
    assert relative_error(linear.forward_rotated(linear.rotate(x.cuda())).cpu(), expected) < 2e-3


@pytest.mark.parametrize("bits", BITS)
def test_rows_before_the_rotation_is_undone_have_the_bits_of_the_cpu(bits: float) -> None:
    matrix = random_matrix(16 * 100, 256, bits)
    plain, moved = TrellisEmbedding(matrix), TrellisEmbedding(matrix).to("cuda")
    bands = torch.tensor([0, 3, 99])
    assert torch.equal(moved._decode_bands(bands.cuda()).cpu(), plain._decode_bands(bands))
    ids = torch.randint(0, 1600, (3, 200), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved(ids.cuda()).cpu(), plain(ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        moved.decode_rows(slice(16, 64)).cpu(), plain.decode_rows(slice(16, 64)), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [1, 8, 9, 60, 500])
def test_experts_compute_what_they_do_on_the_cpu(bits: float, tokens: int) -> None:
    x, chosen = some_states(tokens, HIDDEN), routing(tokens)
    expected = some_experts(bits)(x, chosen)
    experts = some_experts(bits).to("cuda")
    assert experts.stacked
    found = experts(x.cuda(), type(chosen)(*(part.cuda() for part in chosen)))
    assert relative_error(found.cpu(), expected) < 2e-3


def test_experts_that_differ_in_their_signs_run_one_by_one() -> None:
    x, chosen = some_states(7, HIDDEN), routing(7)
    experts = some_experts(3, alike=False).to("cuda")
    assert not experts.stacked
    found = experts(x.cuda(), type(chosen)(*(part.cuda() for part in chosen)))
    assert relative_error(found.cpu(), some_experts(3, alike=False)(x, chosen)) < 2e-3


def test_a_head_multiplies_with_the_table_of_the_embedding() -> None:
    matrix, hidden = random_matrix(160, 64, 4), some_states(2, 50, 64)
    expected = TrellisHead(TrellisEmbedding(matrix), torch.ones(160))(hidden)
    head = TrellisHead(TrellisEmbedding(matrix), torch.ones(160)).to("cuda")
    assert relative_error(head(hidden.cuda()).cpu(), expected) < 2e-3


def test_a_move_takes_little_more_memory_than_the_packed_weights() -> None:
    matrix = random_matrix(8192, 2048, 4)
    linear = TrellisLinear(matrix)
    TrellisLinear(random_matrix(16, 64)).to("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    linear.to("cuda")
    held = torch.cuda.memory_allocated() - before
    assert held < matrix.packed.nbytes + matrix.scale.nbytes + matrix.signs.nbytes + 8192
    assert linear.packed is None


def test_a_way_back_to_the_cpu_is_refused_in_one_sentence() -> None:
    linear = TrellisLinear(random_matrix(32, 64)).to("cuda").half()
    assert linear.scale.dtype is torch.float16
    with pytest.raises(BackendUnavailableError, match=r"can't be moved from cuda:0 to cpu"):
        linear.to("cpu")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("alike", [True, False])
def test_experts_compute_the_same_on_a_gpu_that_is_not_the_current_one(alike: bool) -> None:
    x, chosen = some_states(7, HIDDEN), routing(7)
    experts = some_experts(3, alike=alike).to("cuda:1")
    arguments = x.to("cuda:1"), type(chosen)(*(part.to("cuda:1") for part in chosen))
    # What a kernel should have written, and has not because it ran elsewhere, is then not a number.
    torch.full((64_000_000,), torch.nan, device="cuda:1")  # freed at once
    found = experts(*arguments)
    assert torch.cuda.current_device() == 0
    assert relative_error(found.cpu(), some_experts(3, alike=alike)(x, chosen)) < 2e-3
