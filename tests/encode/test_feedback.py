"""LDLQ: its factor, and that feedback lowers the loss that it is for."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ernieq.encode.feedback import block_ldl_factor, damped, encode_ldlq
from ernieq.encode.matrix import proxy_error
from ernieq.encode.scales import initial_scale
from ernieq.kernels.backend import Backend
from ernieq.kernels.viterbi import encode_tiles
from ernieq.trellis import TrellisCode

CODE = TrellisCode(2, 10)


def correlated_hessian(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return inputs.T @ inputs / inputs.shape[0]


def encode(weight: Tensor, factor: Tensor) -> Tensor:
    scale = initial_scale(weight, 2).float()
    _, normalised = encode_ldlq(
        weight, factor, scale, CODE, first_pass_steps=256, backend=Backend.AUTO, threads=1
    )
    return normalised * scale[:, None]


def test_the_factor_is_unit_block_lower_triangular_and_diagonalises_the_hessian() -> None:
    hessian = correlated_hessian(64)
    factor = block_ldl_factor(hessian, damping=0.01).double()
    inverse = torch.linalg.inv(factor)
    middle = inverse @ damped(hessian.double(), 0.01) @ inverse.T
    scale = float(middle.abs().max())
    for row in range(4):
        for column in range(4):
            block = factor[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            rest = middle[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            if row == column:
                assert torch.allclose(block, torch.eye(16, dtype=torch.float64), atol=1e-5)
            else:
                assert float(rest.abs().max()) < 1e-5 * scale
            if row < column:
                assert float(block.abs().max()) == 0


def test_a_singular_hessian_is_damped_until_it_factors() -> None:
    direction = torch.ones(32, 1)
    factor = block_ldl_factor(direction @ direction.T, damping=1e-18)
    assert bool(torch.isfinite(factor).all())
    assert torch.equal(block_ldl_factor(torch.zeros(32, 32), 0.01), torch.eye(32))


def test_ldlq_with_an_identity_hessian_is_plain_rounding() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    together = encode(weight, block_ldl_factor(torch.eye(48), 0.01))
    alone = torch.cat([encode_block(weight, start) for start in range(0, 48, 16)], dim=1)
    assert torch.equal(together, alone)


def encode_block(weight: Tensor, start: int) -> Tensor:
    scale = initial_scale(weight, 2).float()
    block = weight[:, start : start + 16].contiguous()
    _, normalised = encode_ldlq(
        block, torch.eye(16), scale, CODE, first_pass_steps=256, backend=Backend.AUTO, threads=1
    )
    return normalised * scale[:, None]


def test_ldlq_with_a_real_hessian_has_less_proxy_loss_than_plain_rounding() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    hessian = correlated_hessian(128)
    with_feedback = encode(weight, block_ldl_factor(hessian, 0.01))
    without = encode(weight, torch.eye(128))
    assert proxy_error(weight, with_feedback, hessian) < 0.7 * proxy_error(weight, without, hessian)


def test_the_reported_values_are_those_of_the_symbols() -> None:
    from ernieq.trellis import EncodedMatrix, pack_symbols

    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    scale = initial_scale(weight, 2)
    symbols, normalised = encode_ldlq(
        weight, torch.eye(32), scale.float(), CODE, first_pass_steps=256, backend=Backend.AUTO, threads=1
    )
    matrix = EncodedMatrix(pack_symbols(symbols, CODE), scale.numpy(), np.ones(32, np.int8), 32, CODE)
    assert np.array_equal(matrix.rotated_weight(), (normalised * scale.float()[:, None]).numpy())


@pytest.mark.parametrize("steps", [96, 256])
def test_the_length_of_the_first_pass_reaches_the_search(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = encode_tiles

    def spy(*args: object, first_pass_steps: int, **kwargs: object) -> object:
        seen.append(first_pass_steps)
        return real(*args, first_pass_steps=first_pass_steps, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("ernieq.encode.feedback.encode_tiles", spy)
    weight = torch.randn(16, 16)
    encode_ldlq(
        weight, torch.eye(16), torch.ones(16), CODE, first_pass_steps=steps, backend=Backend.AUTO, threads=1
    )
    assert seen == [steps]
