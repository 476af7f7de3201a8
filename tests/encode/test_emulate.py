"""Emulated errors have the size and the shape of what the encoder really leaves."""

from __future__ import annotations

import pytest
import torch

from ernieq.encode import SQUARED_ERROR, EncodeOptions, emulated_errors, encode_matrices, input_signs
from ernieq.encode.matrix import proxy_error
from ernieq.trellis import TrellisCode

ROWS, COLUMNS, DAMPING = 128, 128, 0.01


def hessian() -> torch.Tensor:
    """Of inputs whose channels depend on each other, with powers from 1 down to 1/50."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, COLUMNS, generator=draw) @ torch.randn(COLUMNS, COLUMNS, generator=draw)
    inputs = inputs * torch.logspace(0, -0.85, COLUMNS)
    return inputs.T @ inputs / 2000


def weight() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, COLUMNS, generator=draw) * torch.linspace(0.5, 2, ROWS)[:, None]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_proxy_loss_of_emulated_errors_is_that_of_the_encoder(bits: float) -> None:
    matrix, curvature, signs = weight(), hessian(), input_signs(0, "input", COLUMNS)
    code = TrellisCode(bits, 12)
    real = encode_matrices({"w": matrix}, curvature, signs, code, EncodeOptions(DAMPING, threads=1))["w"]
    error = emulated_errors({"w": matrix}, curvature, signs, DAMPING, 0)["w"] * SQUARED_ERROR[bits] ** 0.5
    found = proxy_error(matrix, matrix + error, curvature)
    assert found == pytest.approx(real.proxy_error, rel=0.2)
    plain = proxy_error(
        matrix, matrix + SQUARED_ERROR[bits] ** 0.5 * matrix.std() * torch.randn(ROWS, COLUMNS), curvature
    )
    assert found < 0.8 * plain  # errors that no feedback has shaped cost more


def test_without_a_hessian_every_row_errs_by_its_own_power() -> None:
    matrix = weight()
    error = emulated_errors({"w": matrix}, None, input_signs(0, "input", COLUMNS), DAMPING, 0)["w"]
    shares = error.square().mean(dim=1) / matrix.square().mean(dim=1)
    assert float(shares.mean()) == pytest.approx(1, rel=0.05)
    assert float(shares.max()) < 2


def test_a_matrix_draws_by_its_name_and_the_seed_alone() -> None:
    matrix, signs = weight(), input_signs(0, "input", COLUMNS)
    alone = emulated_errors({"a": matrix}, hessian(), signs, DAMPING, 0)["a"]
    both = emulated_errors({"b": matrix, "a": matrix}, hessian(), signs, DAMPING, 0)
    assert torch.equal(alone, both["a"])
    assert not torch.allclose(alone, both["b"])
    assert not torch.allclose(alone, emulated_errors({"a": matrix}, hessian(), signs, DAMPING, 1)["a"])
