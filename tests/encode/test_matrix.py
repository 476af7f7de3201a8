"""Whole matrices: rotation, scales, groups, widths, and hostile weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernieq.encode import EncodeOptions, encode_matrices, input_signs, rotation_block
from ernieq.encode.incoherence import rotate_hessian
from ernieq.encode.matrix import proxy_error
from ernieq.encode.scales import SMALLEST_SCALE, initial_scale, refit_scale, to_float16
from ernieq.errors import NonFiniteError, ShapeError
from ernieq.kernels.hadamard import rotate, unrotate
from ernieq.trellis import RATES, TrellisCode

CODE = TrellisCode(2, 10)
OPTIONS = EncodeOptions(threads=1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(weight: Tensor, hessian: Tensor | None = None, code: TrellisCode = CODE) -> Tensor:
    width = weight.shape[1]
    hessian = torch.eye(width) if hessian is None else hessian
    signs = input_signs(0, "group", width)
    return encode_matrices({"w": weight}, hessian, signs, code, OPTIONS)["w"].decoded


@pytest.mark.parametrize(
    ("width", "block"), [(2560, 128), (1536, 128), (576, 64), (48, 16), (16, 16), (80, 16)]
)
def test_the_rotation_block_is_the_largest_power_of_two_that_divides(width: int, block: int) -> None:
    assert rotation_block(width) == block


@given(st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_rotation_is_orthonormal_and_undone_by_its_inverse(sixteenths: int, seed: int) -> None:
    width = 16 * sixteenths
    signs = torch.from_numpy(input_signs(seed, "x", width))
    x = random(3, width, seed=seed)
    turned = rotate(x, signs, rotation_block(width))
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), rtol=1e-5)
    assert torch.allclose(unrotate(turned, signs, rotation_block(width)), x, atol=1e-5)


def test_a_rotated_hessian_is_that_of_rotated_inputs() -> None:
    signs = torch.from_numpy(input_signs(1, "x", 96))
    inputs = random(200, 96)
    turned = rotate(inputs, signs, 32)
    expected = turned.T @ turned
    assert torch.allclose(rotate_hessian(inputs.T @ inputs, signs, 32), expected, atol=1e-2)


def test_signs_depend_on_seed_and_group_alone_and_are_pinned() -> None:
    first = input_signs(0, "model.layers.0.mlp.input", 64)
    assert np.array_equal(first, input_signs(0, "model.layers.0.mlp.input", 64))
    assert not np.array_equal(first, input_signs(1, "model.layers.0.mlp.input", 64))
    assert not np.array_equal(first, input_signs(0, "model.layers.1.mlp.input", 64))
    assert np.array_equal(first[:32], input_signs(0, "model.layers.0.mlp.input", 32))
    assert set(np.unique(first)) == {-1, 1}
    # Bytes are forever: a changed generator would change every checkpoint.
    assert "".join("-" if sign < 0 else "+" for sign in first[:16]) == "+-+++-+---+-+++-"


@pytest.mark.parametrize("width", [16, 48, 80, 576])
@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 4])
def test_any_width_that_is_a_multiple_of_16_encodes_near_its_rate(width: int, bits: float) -> None:
    weight = random(48, width)
    error = float(
        (encode(weight, code=TrellisCode(bits, 12)) - weight).square().mean() / weight.square().mean()
    )
    assert error < 1.35 * 4.0**-bits


def test_matrices_of_a_group_are_encoded_as_each_would_be_alone() -> None:
    first, second = random(32, 64), random(16, 64, seed=1)
    signs = input_signs(0, "g", 64)
    hessian = torch.eye(64)
    together = encode_matrices({"a": first, "b": second}, hessian, signs, CODE, OPTIONS)
    for name, weight in (("a", first), ("b", second)):
        alone = encode_matrices({name: weight}, hessian, signs, CODE, OPTIONS)[name]
        np.testing.assert_array_equal(alone.encoded.packed, together[name].encoded.packed)
        np.testing.assert_array_equal(alone.encoded.scale, together[name].encoded.scale)


def test_the_decoded_matrix_is_what_the_packed_one_stands_for() -> None:
    weight = random(32, 96)
    signs = input_signs(0, "g", 96)
    result = encode_matrices({"w": weight}, torch.eye(96), signs, CODE, OPTIONS)["w"]
    rotated = torch.from_numpy(result.encoded.rotated_weight())
    assert torch.equal(unrotate(rotated, torch.from_numpy(signs), 32), result.decoded)
    assert result.proxy_error == pytest.approx(
        float((result.decoded - weight).square().sum() / weight.square().sum()), rel=1e-4
    )


def test_an_outlier_is_spread_so_that_it_costs_no_more_than_its_share() -> None:
    weight = random(32, 128)
    weight[3, 5] = 30.0
    assert float((encode(weight) - weight).square().sum() / weight.square().sum()) < 0.12


def test_an_all_zero_row_decodes_to_almost_nothing_with_a_positive_scale() -> None:
    weight = random(32, 64)
    weight[7] = 0
    signs = input_signs(0, "g", 64)
    result = encode_matrices({"w": weight}, torch.eye(64), signs, CODE, OPTIONS)["w"]
    assert float(result.encoded.scale[7]) == SMALLEST_SCALE
    assert float(result.decoded[7].abs().max()) < 3e-6


def test_a_side_that_is_no_multiple_of_16_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match=r"w has shape \(24, 32\)"):
        encode(random(24, 32))


def test_a_hessian_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(NonFiniteError, match="input of w has NaN"):
        encode(random(16, 32), torch.full((32, 32), float("nan")))


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="beyond the range of float16"):
        to_float16(torch.tensor([1e6]))


def test_the_fitted_scale_is_the_least_squares_one() -> None:
    hessian = random(64, 64)
    hessian = hessian @ hessian.T
    normalised, weight = random(16, 64), random(16, 64, seed=1)
    weight = 0.5 * normalised + 0.01 * weight
    before = torch.full((16,), 0.45).half()
    fitted = refit_scale(weight, normalised, hessian, before).float()[:, None]
    best = proxy_error(weight, fitted * normalised, hessian)
    for factor in (0.98, 1.02):
        assert best < proxy_error(weight, factor * fitted * normalised, hessian)


def test_a_senseless_fit_keeps_the_scale_of_the_search() -> None:
    normalised = random(4, 16)
    before = torch.full((4,), 0.5).half()
    assert torch.equal(refit_scale(-normalised, normalised, torch.eye(16), before), before)


def test_more_bits_take_a_wider_codebook() -> None:
    weight = random(16, 64)
    scales = [float(initial_scale(weight, bits).float().mean()) for bits in RATES]
    assert scales == sorted(scales)
