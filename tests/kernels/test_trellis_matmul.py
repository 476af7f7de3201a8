"""Products with encoded matrices: every compiled path against `EncodedMatrix.rotated_weight` and float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ernieq.errors import ShapeError
from ernieq.kernels import Backend, _native
from ernieq.kernels.trellis_matmul import FUSED_LIMIT, decode, matmul
from ernieq.trellis import RATES, EncodedMatrix, TrellisCode

COMPILED = [Backend(name) for name in _native.available_isas()]
CODES = [TrellisCode(bits, n) for bits in RATES for n in (12, 16) if n == 16 or bits <= 6]


def some_matrix(code: TrellisCode, rows: int = 48, columns: int = 80) -> EncodedMatrix:
    random = np.random.default_rng(code.pair_bits)
    shape = (rows // 16, columns // 16, code.units_per_tile)
    return EncodedMatrix(
        packed=random.integers(-(2**15), 2**15, shape).astype(np.int16),
        scale=(random.standard_normal(rows) / 30).astype(np.float16),
        signs=np.ones(columns, np.int8),
        rotation_block=16,
        code=code,
    )


def tensors(matrix: EncodedMatrix) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(matrix.packed), torch.from_numpy(matrix.scale)


def some_rows(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("backend", [*COMPILED, Backend.REFERENCE])
def test_decoded_weights_are_bit_equal_to_the_encoded_matrix(backend: Backend, code: TrellisCode) -> None:
    matrix = some_matrix(code)
    packed, scale = tensors(matrix)
    np.testing.assert_array_equal(decode(packed, scale, code, backend=backend).numpy(), matrix.rotated_weight())


@pytest.mark.parametrize("backend", COMPILED)
def test_every_fp16_scale_is_read_exactly(backend: Backend) -> None:
    code = TrellisCode(2, 10)
    scale = np.array([6e-8, 5.9e-5, 6.1e-5, 1.0, -0.333, 65504, 1e-3, 0.0] * 2, np.float16)
    matrix = EncodedMatrix(some_matrix(code, 16, 16).packed, scale, np.ones(16, np.int8), 16, code)
    found = decode(*tensors(matrix), code, backend=backend).numpy()
    np.testing.assert_array_equal(found, matrix.rotated_weight())


@pytest.mark.parametrize("tokens", [1, 3, 8, FUSED_LIMIT + 1])
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("backend", [*COMPILED, Backend.REFERENCE])
def test_a_product_is_that_of_the_decoded_matrix(backend: Backend, code: TrellisCode, tokens: int) -> None:
    matrix = some_matrix(code)
    x = some_rows(tokens, matrix.in_features)
    expected = x.double() @ torch.from_numpy(matrix.rotated_weight()).double().T
    found = matmul(x, *tensors(matrix), code, backend=backend)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("backend", COMPILED)
def test_a_wide_product_keeps_its_precision_when_all_inputs_are_alike(backend: Backend) -> None:
    matrix = some_matrix(TrellisCode(2), 16, 4096)
    x = torch.ones(1, 4096)
    expected = torch.from_numpy(matrix.rotated_weight()).double().sum(1)
    found = matmul(x, *tensors(matrix), matrix.code, backend=backend)
    assert float((found[0] - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("backend", COMPILED)
def test_the_result_of_a_token_does_not_depend_on_the_batch_or_on_threads(backend: Backend) -> None:
    matrix = some_matrix(TrellisCode(3), 512, 1536)  # large enough for more than one thread
    x = some_rows(FUSED_LIMIT, 1536)
    alone = torch.cat(
        [matmul(row[None], *tensors(matrix), matrix.code, backend=backend, threads=1) for row in x]
    )
    for tokens in (2, 3, 5, 8, 9, FUSED_LIMIT):
        together = matmul(x[:tokens], *tensors(matrix), matrix.code, backend=backend, threads=3)
        assert torch.equal(together, alone[:tokens]), f"{tokens} tokens"


def test_a_range_of_rows_decodes_as_in_the_whole() -> None:
    matrix = some_matrix(TrellisCode(4), 96, 32)
    packed, scale = tensors(matrix)
    band = decode(packed, scale, matrix.code, rows=slice(32, 80))
    np.testing.assert_array_equal(band.numpy(), matrix.rotated_weight()[32:80])


def test_many_tokens_are_multiplied_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernieq.kernels.trellis_matmul._BUFFER_WEIGHTS", 80 * 32)
    matrix = some_matrix(TrellisCode(2), 48, 80)  # two chunks: 32 rows and 16
    x = some_rows(40, 80)
    expected = x.double() @ torch.from_numpy(matrix.rotated_weight()).double().T
    assert float((matmul(x, *tensors(matrix), matrix.code) - expected).norm() / expected.norm()) < 1e-6


def test_no_tokens_give_no_rows() -> None:
    matrix = some_matrix(TrellisCode(2))
    assert matmul(torch.empty(0, 80), *tensors(matrix), matrix.code).shape == (0, 48)


def test_inputs_that_are_not_contiguous_are_taken() -> None:
    matrix = some_matrix(TrellisCode(2))
    x = some_rows(80, 4).T
    assert torch.equal(
        matmul(x, *tensors(matrix), matrix.code), matmul(x.contiguous(), *tensors(matrix), matrix.code)
    )


@pytest.mark.parametrize("rows", [slice(8, 32), slice(0, 40), slice(0, 48, 16)])
def test_rows_that_cut_a_tile_are_refused(rows: slice) -> None:
    matrix = some_matrix(TrellisCode(2))
    with pytest.raises(ShapeError, match="must start and end at multiples of 16"):
        decode(*tensors(matrix), matrix.code, rows=rows)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    matrix = some_matrix(TrellisCode(2))
    packed, scale = tensors(matrix)
    with pytest.raises(ShapeError, match=r"expected \(tokens, 80\)"):
        matmul(torch.zeros(1, 64), packed, scale, matrix.code)
    with pytest.raises(ShapeError, match=r"scale has shape \(32,\); expected \(48,\)"):
        matmul(torch.zeros(1, 80), packed, scale[:32], matrix.code)
    with pytest.raises(ShapeError, match="packed has shape"):
        decode(packed, scale, TrellisCode(3))


def test_the_compiled_entry_refuses_what_would_read_out_of_bounds() -> None:
    packed, scale = (part.numpy() for part in tensors(some_matrix(TrellisCode(2))))
    out = np.zeros((1, 48), np.float32)
    with pytest.raises(ValueError, match="do not fit together"):
        _native.trellis_multiply(np.zeros((1, 96), np.float32), packed, scale, 4, 16, out, "scalar", 1)
    with pytest.raises(ValueError, match="16 units per bit"):
        _native.trellis_multiply(np.zeros((1, 80), np.float32), packed, scale, 8, 16, out, "scalar", 1)
    with pytest.raises(ValueError, match="do not fit the matrix"):
        _native.trellis_decode(packed, scale, 4, 16, 3, np.zeros((16, 80), np.float32), "scalar", 1)
    for pair_bits, state_bits in ((2, 16), (13, 16), (15, 16), (18, 16), (4, 18), (11, 11), (16, 14)):
        with pytest.raises(ValueError, match="unsupported trellis code"):
            _native.trellis_multiply(
                np.zeros((1, 80), np.float32), packed, scale, pair_bits, state_bits, out, "scalar", 1
            )
    with pytest.raises(TypeError):
        _native.trellis_decode(packed[:, ::2], scale, 4, 16, 0, np.zeros((16, 48), np.float32), "scalar", 1)
