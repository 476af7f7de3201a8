"""The rotation: what the compiled path and the reference share, and what makes it a rotation."""

import pytest
import torch
from torch import Tensor

from ernieq.errors import ShapeError
from ernieq.kernels import Backend
from ernieq.kernels.hadamard import reference, rotate, unrotate

BLOCKS = [1, 2, 4, 16, 64, 128]


def some_signs(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (torch.randint(0, 2, (width,), generator=generator) * 2 - 1).to(torch.int8)


def some_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def test_the_reference_matrix_is_that_of_sylvesters_recursion() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 64:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    torch.testing.assert_close(reference.hadamard_matrix(64), matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_compiled_rotation_equals_the_reference(block: int) -> None:
    x, signs = some_rows(3, 5, 256), some_signs(256)
    expected = reference.rotate(x, signs, block)
    torch.testing.assert_close(rotate(x, signs, block), expected, rtol=0, atol=2e-6)
    expected = reference.unrotate(x, signs, block)
    torch.testing.assert_close(unrotate(x, signs, block), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.SCALAR])
@pytest.mark.parametrize("block", BLOCKS)
def test_unrotating_undoes_the_rotation(block: int, backend: Backend) -> None:
    x, signs = some_rows(4, 384), some_signs(384)
    there = rotate(x, signs, block, backend=backend)
    torch.testing.assert_close(unrotate(there, signs, block, backend=backend), x, rtol=0, atol=3e-6)
    assert block == 1 or not torch.allclose(there, x, atol=0.1)


def test_the_rotation_keeps_inner_products() -> None:
    x, y, signs = some_rows(1, 256), some_rows(2, 256)[1:], some_signs(256)
    rotated = (rotate(x, signs, 128).double() * rotate(y, signs, 128).double()).sum()
    assert float(rotated) == pytest.approx(float((x.double() * y.double()).sum()), abs=1e-4)


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads() -> None:
    x, signs = some_rows(600, 256), some_signs(256)
    together = rotate(x, signs, 128, threads=3)
    assert torch.equal(together[417:418], rotate(x[417:418], signs, 128, threads=1))


def test_rows_that_are_not_contiguous_and_signs_as_floats_are_taken() -> None:
    x, signs = some_rows(64, 8).T, some_signs(64)
    assert torch.equal(rotate(x, signs.float(), 16), rotate(x.contiguous(), signs, 16))


@pytest.mark.parametrize("block", [0, 3, 48, 256])
def test_a_block_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(ShapeError, match=f"rotation block {block} is not a power of two that divides 144"):
        rotate(torch.zeros(2, 144), torch.ones(144), block)


def test_signs_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"signs have shape \(32,\); expected \(64,\)"):
        unrotate(torch.zeros(2, 64), torch.ones(32), 64)
