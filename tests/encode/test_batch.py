"""The batched encoder does what the plain one does, matrix by matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ernieq.encode import EncodeOptions, encode_batch, encode_matrices, input_signs
from ernieq.encode.batch_feedback import block_ldl_factors, encode_ldlq_batch
from ernieq.encode.batch_matrix import encode_in_pieces
from ernieq.encode.feedback import block_ldl_factor, encode_ldlq
from ernieq.encode.ring_tensors import block_to_tiles, pack_rings, symbol_values, tiles_to_block
from ernieq.encode.scales import initial_scale
from ernieq.errors import NonFiniteError, ShapeError
from ernieq.kernels.backend import Backend
from ernieq.trellis import (
    RATES,
    EncodedMatrix,
    TrellisCode,
    matrix_to_tiles,
    pack_symbols,
    ring_states,
    state_values,
    tiles_to_matrix,
)

CODE = TrellisCode(2, 10)
OPTIONS = EncodeOptions(threads=1)
WIDTH = 272  # two whole groups of columns and one block


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(width: int, seed: int = 0) -> Tensor:
    inputs = random(4 * width, width, seed=seed) @ random(width, width, seed=seed + 100)
    return inputs.T @ inputs / inputs.shape[0]


def stacks(count: int, width: int = WIDTH) -> list[dict[str, Tensor]]:
    return [
        {"gate": random(32, width, seed=place), "up": random(16, width, seed=50 + place)}
        for place in range(count)
    ]


@pytest.mark.parametrize(
    ("bits", "state_bits"), [(2, 10), (3, 11), (4, 14), (5, 12), (7, 14), *((bits, 16) for bits in RATES)]
)
def test_rings_of_tensors_are_those_of_the_trellis(bits: float, state_bits: int) -> None:
    code = TrellisCode(bits, state_bits)
    random_tiles = np.random.default_rng(0).integers(0, [code.symbols_at(t) for t in range(256)], (3, 5, 256))
    symbols = random_tiles.astype(np.uint8)
    tensor = torch.from_numpy(symbols)
    assert np.array_equal(pack_rings(tensor, code).numpy(), pack_symbols(symbols, code))
    values = symbol_values(tensor.view(-1, 256), code).view(3, 5, 256)
    assert np.array_equal(values.numpy(), state_values(state_bits)[ring_states(symbols, code)])


def test_tiles_of_tensors_are_those_of_the_trellis() -> None:
    block = random(2, 48, 16)
    tiles = block_to_tiles(block)
    expected = np.concatenate([matrix_to_tiles(matrix.numpy())[:, 0] for matrix in block])
    assert np.array_equal(tiles.numpy(), expected)
    assert torch.equal(tiles_to_block(tiles, block.shape), block)
    assert np.array_equal(tiles_to_matrix(tiles[:3, None].numpy()), block[0].numpy())


def test_factors_of_a_batch_are_those_of_each_hessian_and_a_singular_one_is_damped_alone() -> None:
    direction = torch.ones(32, 1)
    hessians = [correlated_hessian(32), direction @ direction.T, torch.zeros(32, 32), correlated_hessian(32, 1)]
    factors = block_ldl_factors(hessians, 1e-18)
    for factor, hessian in zip(factors, hessians, strict=True):
        expected = block_ldl_factor(hessian, 1e-18)
        assert bool(torch.isfinite(factor).all())
        torch.testing.assert_close(factor, expected, rtol=1e-4, atol=1e-4)
    wide = correlated_hessian(528)  # more columns than are solved for at a time
    torch.testing.assert_close(block_ldl_factors([wide], 0.01)[0], block_ldl_factor(wide, 0.01))


def test_with_an_identity_hessian_the_symbols_are_those_of_the_plain_path() -> None:
    weights = random(3, 32, WIDTH)
    scales = initial_scale(weights, 2).float()
    identity = torch.eye(WIDTH)
    symbols, values = encode_ldlq_batch(
        weights, identity.expand(3, -1, -1), scales, CODE, first_pass_steps=256, threads=1
    )
    for place, weight in enumerate(weights):
        expected, normalised = encode_ldlq(
            weight, identity, scales[place], CODE, first_pass_steps=256, backend=Backend.AUTO, threads=1
        )
        assert np.array_equal(symbols[place].numpy(), expected)
        assert torch.equal(values[place].float() / 128, normalised)


def test_a_batch_has_the_proxy_errors_of_its_matrices_encoded_one_by_one() -> None:
    batch, hessians = stacks(3), [correlated_hessian(WIDTH, seed) for seed in range(3)]
    signs = input_signs(0, "g", WIDTH)
    together = encode_batch(batch, hessians, signs, CODE, OPTIONS)
    for stack, hessian, found in zip(batch, hessians, together, strict=True):
        alone = encode_matrices(stack, hessian, signs, CODE, OPTIONS)
        assert list(found) == list(alone)
        for name, result in alone.items():
            assert found[name].proxy_error == pytest.approx(result.proxy_error, rel=0.01)
            assert found[name].decoded.shape == result.decoded.shape


def test_feedback_across_groups_of_columns_lowers_the_error() -> None:
    batch, hessian, signs = stacks(1), correlated_hessian(WIDTH), input_signs(0, "g", WIDTH)
    with_feedback = encode_batch(batch, [hessian], signs, CODE, OPTIONS)[0]["gate"].decoded
    without = encode_batch(batch, [torch.eye(WIDTH)], signs, CODE, OPTIONS)[0]["gate"].decoded
    losses = []
    for decoded in (with_feedback, without):
        difference = decoded - batch[0]["gate"]
        losses.append(float(((difference @ hessian) * difference).sum()))
    assert losses[0] < 0.7 * losses[1]


def test_a_decoded_matrix_of_a_batch_is_what_the_packed_one_stands_for() -> None:
    signs = input_signs(0, "g", 96)
    for found in encode_batch(stacks(2, 96), [correlated_hessian(96, s) for s in (0, 1)], signs, CODE, OPTIONS):
        for result in found.values():
            expected = own_basis(result.encoded)
            torch.testing.assert_close(result.decoded, expected, rtol=1e-5, atol=1e-6)


def own_basis(encoded: EncodedMatrix) -> Tensor:
    from ernieq.kernels.hadamard import unrotate

    rotated = torch.from_numpy(encoded.rotated_weight())
    return unrotate(rotated, torch.from_numpy(encoded.signs), encoded.rotation_block)


def test_rows_in_pieces_are_coded_as_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernieq.encode.batch_matrix._tiles_that_fit", lambda *_: 2)
    weights = {"q": random(48, 96), "k": random(16, 96, seed=1), "v": random(32, 96, seed=2)}
    hessian, signs = correlated_hessian(96), input_signs(0, "g", 96)
    pieces = encode_in_pieces(weights, hessian, signs, CODE, EncodeOptions(threads=1, memory_bytes=1))
    together = encode_batch([weights], [hessian], signs, CODE, OPTIONS)[0]
    assert list(pieces) == list(weights)
    for name, result in together.items():
        assert pieces[name].proxy_error == pytest.approx(result.proxy_error, rel=0.01)
        assert pieces[name].decoded.shape == weights[name].shape
        torch.testing.assert_close(pieces[name].decoded, own_basis(pieces[name].encoded), rtol=1e-5, atol=1e-6)


def test_progress_adds_up_to_all_weights_of_the_batch() -> None:
    seen: list[int] = []
    signs = input_signs(0, "g", 96)
    encode_batch(stacks(2, 96), [torch.eye(96)] * 2, signs, CODE, OPTIONS, seen.append)
    assert sum(seen) == 2 * 48 * 96


def test_a_hessian_that_is_not_finite_is_named_by_its_matrix() -> None:
    batch = [{"good": random(16, 32)}, {"bad": random(16, 32)}]
    hessians = [torch.eye(32), torch.full((32, 32), float("nan"))]
    with pytest.raises(NonFiniteError, match="input of bad has NaN"):
        encode_batch(batch, hessians, input_signs(0, "g", 32), CODE, OPTIONS)


def test_a_side_that_is_no_multiple_of_16_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match=r"w has shape \(24, 32\)"):
        encode_batch([{"w": random(24, 32)}], [torch.eye(32)], input_signs(0, "g", 32), CODE, OPTIONS)
