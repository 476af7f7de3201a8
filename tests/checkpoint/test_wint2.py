"""The 2-bit code and its neighbours against vectors computed from the formula, one number at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ernieq.checkpoint.input_order import InputOrder, told_by_channels
from ernieq.checkpoint.weight_only import decode_int4, decode_int8
from ernieq.checkpoint.wint2 import decode_wint2, natural_inputs
from ernieq.errors import CheckpointError
from tests.checkpoint.wint2_files import Wint2Matrix, for_the_gpu, in_natural_order


def decode(matrix: Wint2Matrix) -> Tensor:
    return decode_wint2(*matrix.tensors("m").values())


def one_channel(value: int, code_scale: float, code_zp: float, *, nibbles: int = 0x11) -> Tensor:
    """128 inputs of one channel, all bytes the same."""
    return decode(
        Wint2Matrix(
            np.full((32, 1), value, np.uint8),
            np.full((1, 1), nibbles, np.uint8),
            torch.ones(1),
            np.array([code_scale], np.float32),
            np.array([code_zp], np.float32),
        )
    )[0]


@pytest.mark.parametrize("seed", range(3))
def test_every_weight_is_what_the_formula_says(seed: int) -> None:
    matrix = Wint2Matrix.random(256, 12, seed)
    found = decode(matrix)
    assert (found.double().numpy() == matrix.decoded()).all()
    assert found.shape == (12, 256)
    assert (found < 0).any()


def test_a_code_word_worked_out_by_hand() -> None:
    # 200 * 10.5 + 3.25 = 2103.25, c = 2103 = 0b100000110111; windows of six bits, 32 less: 4, 32, 6, 55.
    assert one_channel(200, 10.5, 3.25)[:4].tolist() == [-28, 0, -26, 23]


@pytest.mark.parametrize(
    ("value", "zero_point", "code"),
    [(1, 0.0, 1), (3, 0.0, 2), (1, -1.0, 0), (0, -0.5, 0), (1, -2.0, -1), (0, -2.0, -2)],
)
def test_halves_are_rounded_up_on_both_sides_of_zero(value: int, zero_point: float, code: int) -> None:
    expected = [((code >> shift) & 63) - 32 for shift in (9, 6, 3, 0)]
    assert one_channel(value, 0.5, zero_point)[:4].tolist() == expected


def test_even_groups_take_the_high_nibble() -> None:
    found = one_channel(0, 1.0, 0.0, nibbles=0x5C)
    assert found[:64].tolist() == [-32.0 * 5] * 64
    assert found[64:].tolist() == [-32.0 * 12] * 64


def test_some_output_channels_decode_as_in_the_whole_matrix() -> None:
    parts = Wint2Matrix.random(128, 8, 4).tensors("m").values()
    assert torch.equal(decode_wint2(*(part[..., 3:5] for part in parts)), decode_wint2(*parts)[3:5])


@pytest.mark.parametrize(("part", "number"), [(2, float("nan")), (3, float("inf")), (4, 1e8), (3, 1e6)])
def test_scales_that_make_no_code_are_refused(part: int, number: float) -> None:
    parts = list(Wint2Matrix.random(128, 4, 5).tensors("m").values())
    parts[part] = parts[part].clone()
    parts[part][2] = number
    with pytest.raises(CheckpointError, match=r"NaN or infinite|15 bits"):
        decode_wint2(*parts)


def test_the_kernels_order_is_undone_as_it_is_described() -> None:
    stored = np.arange(3 * 192).reshape(3, 192)
    assert (stored[:, natural_inputs(192).numpy()] == in_natural_order(stored)).all()
    # A lane's first byte holds inputs 0, 1, 8, 9: the operand of one instruction.
    assert [natural_inputs(64).tolist().index(place) for place in range(4)] == [0, 1, 8, 9]


@pytest.mark.parametrize("bits", [8, 4])
def test_weight_only_matrices_come_back_from_the_gpus_layout(bits: int) -> None:
    draw = np.random.default_rng(bits)
    values = draw.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 192))
    scale = torch.from_numpy(draw.uniform(0.5, 2, 8)).to(torch.float16)
    stored = torch.from_numpy(for_the_gpu(values, bits))
    found = (decode_int8 if bits == 8 else decode_int4)(stored, scale)
    assert torch.equal(found, torch.from_numpy(values).float() * scale.float()[:, None])


def test_the_gpus_layout_is_the_one_that_paddle_describes() -> None:
    """Input 0 1 2 3 4 ... 15 holds weight 0 1 8 9 2 3 10 11 ...; bytes of a word are elements 0 2 1 3."""
    values = np.stack([np.arange(64), np.arange(64) - 64])
    stored = for_the_gpu(values, 8).view(np.uint8).astype(int).reshape(-1) - 128
    assert stored[:8].tolist() == [0, 8, 1, 9, 2, 10, 3, 11]
    assert stored[64] == -64  # the other row of the pair follows after 64 inputs
    nibbles = for_the_gpu(np.stack([np.arange(64) % 16 - 8] * 4), 4).view(np.uint8).reshape(-1)
    first_word = [int(byte) >> shift & 15 for byte in nibbles[:4] for shift in (0, 4)]
    assert first_word == [k % 16 for k in (0, 8, 16, 24, 1, 9, 17, 25)]


@pytest.mark.parametrize("order", InputOrder)
def test_norms_and_columns_tell_the_order(order: InputOrder) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(256, generator=generator) + 0.5
    power = norm**-2 * (1 + 0.3 * torch.rand(256, generator=generator))
    if order is InputOrder.KERNEL:
        stored = torch.empty_like(power)
        stored[natural_inputs(256)] = power
        power = stored
    assert told_by_channels([(power, norm)], "it") is order


@pytest.mark.parametrize("flat", [True, False])
def test_an_order_that_nothing_tells_is_asked_for(flat: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    norm = torch.ones(256) if flat else torch.rand(256, generator=generator)
    with pytest.raises(CheckpointError, match="say --input-order plain or kernel"):
        told_by_channels([(torch.rand(256, generator=generator), norm)], "it")
