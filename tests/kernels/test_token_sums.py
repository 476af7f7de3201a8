"""Sums over tokens are right, and the same for any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernieq.kernels.token_sums import add_gram, add_products

pytestmark = pytest.mark.usefixtures("threads_put_back")
TOKENS = 4096  # so many that a library splits the sum between threads


def drawn(tokens: int, width: int, seed: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [48, 256, 1100])
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_gram_is_added_whole_and_symmetric(width: int, tokens: int) -> None:
    states = drawn(tokens, width, 1)
    weights = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(2))
    before = drawn(width, width, 3)
    total = before + before.T
    wanted = total.double() + (states * weights).double().T @ states.double()
    add_gram(total, states * weights, states)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(total, total.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (300, 64), (1100, 20)])
def test_products_are_added_to_what_is_there(rows: int, columns: int) -> None:
    left, right, total = drawn(50, rows, 1), drawn(50, columns, 2), drawn(rows, columns, 3)
    wanted = total.double() + left.double().T @ right.double()
    add_products(total, left, right)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [128, 256, 768])
def test_no_bit_depends_on_the_number_of_threads(width: int) -> None:
    states, others = drawn(TOKENS, width, 1), drawn(TOKENS, 256, 2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gram, products = torch.zeros(width, width), torch.zeros(256, width)
        for _ in range(2):
            add_gram(gram, states, states)
            add_products(products, others, states)
        assert torch.get_num_threads() == threads
        found.append((gram, products))
    for gram, products in found[1:]:
        assert torch.equal(gram, found[0][0])
        assert torch.equal(products, found[0][1])
