"""The encoder's feedback is that of the papers, written a second time in plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ernieq.encode import feedback
from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import FULL_FIRST_PASS, encode_tiles
from ernieq.trellis import (
    TILE_SIDE,
    VALUE_UNIT,
    TrellisCode,
    matrix_to_tiles,
    ring_states,
    state_values,
    tiles_to_matrix,
)
from tests.oracle.ldlq import Matrix, block_ldl, ldlq, proxy_loss

ROWS, COLUMNS = 32, 64
CODE = TrellisCode(2, 10)


def problem(seed: int = 0) -> tuple[Matrix, Matrix]:
    """A weight of unit variance and a Hessian with strong correlations across blocks."""
    draw = np.random.default_rng(seed)
    inputs = draw.standard_normal((400, COLUMNS)) @ (
        np.eye(COLUMNS) + draw.standard_normal((COLUMNS, COLUMNS)) / 6
    )
    return draw.standard_normal((ROWS, COLUMNS)), inputs.T @ inputs / len(inputs)


def nearest(targets: Matrix) -> Matrix:
    """Values of the trellis code nearest to one block column, all rows of unit scale."""
    tiles = matrix_to_tiles((targets * VALUE_UNIT).astype(np.float32))[:, 0]
    symbols = encode_tiles(tiles, CODE, first_pass_steps=FULL_FIRST_PASS, backend=Backend.AUTO, threads=1)
    values = state_values(CODE.state_bits)[ring_states(symbols, CODE)]
    return np.asarray(tiles_to_matrix(values[:, None])).astype(np.float64) / VALUE_UNIT


def encoded(weight: Matrix, factor: torch.Tensor) -> tuple[NDArray[np.uint8], Matrix]:
    symbols, values = feedback.encode_ldlq(
        torch.from_numpy(weight).float(),
        factor,
        torch.ones(ROWS),
        CODE,
        first_pass_steps=FULL_FIRST_PASS,
        backend=Backend.AUTO,
        threads=1,
    )
    return symbols, values.double().numpy()


def test_the_factor_is_that_of_elimination_and_multiplies_back_to_the_hessian() -> None:
    _, hessian = problem()
    factor = block_ldl(hessian, TILE_SIDE)
    found = feedback.block_ldl_factor(torch.from_numpy(hessian).float(), 1e-9).double().numpy()
    np.testing.assert_allclose(found, factor, rtol=1e-3, atol=1e-4)
    diagonal = np.linalg.solve(factor, np.linalg.solve(factor, hessian.T).T)  # L^-1 H L^-T
    for start in range(0, COLUMNS, TILE_SIDE):
        off = np.delete(diagonal[start : start + TILE_SIDE], range(start, start + TILE_SIDE), axis=1)
        assert np.abs(off).max() < 1e-9


def test_every_target_is_the_weight_and_the_errors_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rounder that both sides share, all intermediate targets can be compared, not only the outcome."""
    weight, hessian = problem()
    factor = feedback.block_ldl_factor(torch.from_numpy(hessian).float(), 1e-9)
    asked: list[Matrix] = []

    def watched(targets: NDArray[Any], *arguments: Any, **options: Any) -> Any:
        asked.append(np.asarray(tiles_to_matrix(targets[:, None]), dtype=np.float64) / VALUE_UNIT)
        return encode_tiles(targets, *arguments, **options)

    monkeypatch.setattr(feedback, "encode_tiles", watched)
    _, values = encoded(weight, factor)
    wanted: list[Matrix] = []
    blocks = iter(range(COLUMNS // TILE_SIDE - 1, -1, -1))

    def same_choice(target: Matrix) -> Matrix:
        wanted.append(target)
        start = next(blocks) * TILE_SIDE
        return values[:, start : start + TILE_SIDE]

    ldlq(weight, hessian, TILE_SIDE, same_choice)
    assert len(asked) == len(wanted) == COLUMNS // TILE_SIDE
    for found, expected in zip(asked, wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_outcome_has_the_loss_of_the_papers_algorithm_and_less_than_plain_rounding() -> None:
    weight, hessian = problem()
    factor = feedback.block_ldl_factor(torch.from_numpy(hessian).float(), 1e-9)
    found = proxy_loss(weight, encoded(weight, factor)[1], hessian)
    slow = proxy_loss(weight, ldlq(weight, hessian, TILE_SIDE, nearest), hessian)
    plain = proxy_loss(weight, encoded(weight, torch.eye(COLUMNS))[1], hessian)
    assert found == pytest.approx(slow, rel=0.02)
    assert found < 0.9 * plain


def test_the_loss_is_the_sum_of_what_the_blocks_could_not_cancel() -> None:
    """tr(E H E^T) = sum over blocks of the rounding error of its target, weighed with D of that block."""
    weight, hessian = problem(1)
    factor = block_ldl(hessian, TILE_SIDE)
    diagonal = np.linalg.solve(factor, np.linalg.solve(factor, hessian.T).T)
    parts: list[float] = []
    starts = iter(range(COLUMNS - TILE_SIDE, -1, -TILE_SIDE))

    def rounded(target: Matrix) -> Matrix:
        result, start = nearest(target), next(starts)
        pivot = diagonal[start : start + TILE_SIDE, start : start + TILE_SIDE]
        parts.append(proxy_loss(target, result, pivot))
        return result

    result = ldlq(weight, hessian, TILE_SIDE, rounded)
    assert proxy_loss(weight, result, hessian) == pytest.approx(sum(parts), rel=1e-9)
