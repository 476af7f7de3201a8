"""Products with packed matrices and the parts of a token step on a GPU, against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernieq.kernels.token_step import reference as step_reference
from ernieq.kernels.trellis_matmul import reference
from ernieq.trellis import RATES, TrellisCode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels have nowhere to run"),
]

CODES = [TrellisCode(bits, 16) for bits in RATES] + [
    TrellisCode(2, 10),
    TrellisCode(2.5, 11),
    TrellisCode(3, 12),
    TrellisCode(7, 14),
]


def encoded(rows: int, columns: int, code: TrellisCode, seed: int, matrices: int = 1) -> tuple[Tensor, Tensor]:
    """Random rings (any bits are legal) and row scales, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = (matrices, rows // 16, columns // 16, code.units_per_tile)
    packed = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
    scale = (torch.rand(matrices, rows, generator=generator) * 0.05 + 0.001).half()
    return packed, scale


def inputs(tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and the half rows and factors that stand for them, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    factor = 2.0 ** torch.randint(-3, 4, (tokens,), generator=generator)
    x = torch.randn(tokens, width, generator=generator).half()
    return x.cuda(), factor.cuda()


def relative(found: Tensor, wanted: Tensor) -> float:
    difference = found.cpu().double() - wanted.double()
    return float(difference.norm() / wanted.double().norm())


@pytest.mark.parametrize("code", CODES, ids=str)
def test_decoded_weights_are_the_references_bits(code: TrellisCode) -> None:
    from ernieq.kernels.trellis_matmul import cuda

    packed, scale = encoded(48, 80, code, 1)
    wanted = reference.decode(packed[0], scale[0], code)
    words = cuda.to_words(packed[0].cuda())
    assert torch.equal(cuda.decode(words, scale[0].cuda(), code).cpu(), wanted)
    half = cuda.decode(words, scale[0].cuda(), code, dtype=torch.float16)
    assert torch.equal(half.cpu(), wanted.half())


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 64, 100])
def test_products_of_any_number_of_tokens(code: TrellisCode, tokens: int) -> None:
    from ernieq.kernels.trellis_matmul import cuda

    packed, scale = encoded(64, 240, code, 2)
    x, factor = inputs(tokens, 240, 3)
    out = torch.full((tokens, 64), torch.nan, device="cuda")
    cuda.multiply(x, factor, cuda.to_words(packed[0].cuda()), scale[0].cuda(), code, out=out)
    wanted = reference.matmul((x.float() * factor[:, None]).cpu(), packed[0], scale[0], code)
    assert relative(out, wanted) < 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 3.5, 4, 8])
def test_products_with_selected_matrices(bits: float, shared: bool) -> None:
    from ernieq.kernels.trellis_matmul import cuda

    code = TrellisCode(bits, 16)
    packed, scale = encoded(48, 160, code, 4, matrices=7)
    selected = torch.tensor([[6, 0, 3], [3, 3, 1]], dtype=torch.int32)
    x, factor = inputs(2 if shared else 6, 160, 5)
    found = cuda.multiply_selected(
        x, factor, cuda.to_words(packed.cuda()), scale.cuda(), code, selected.cuda(), shared
    )
    true = (x.float() * factor[:, None]).cpu()
    for pair, matrix in enumerate(selected.flatten().tolist()):
        row = true[pair // 3 if shared else pair][None]
        assert relative(found[pair][None], reference.matmul(row, packed[matrix], scale[matrix], code)) < 1e-6


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3.5, 8])
@pytest.mark.parametrize("counts", [[0, 5, 0, 1, 30], [0, 0, 0, 0, 0], [100, 0, 7, 64, 65]])
def test_products_with_tokens_sorted_by_matrix(counts: list[int], bits: float) -> None:
    from ernieq.kernels.trellis_matmul import cuda

    code = TrellisCode(bits, 16)
    packed, scale = encoded(32, 128, code, 6, matrices=5)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    x, factor = inputs(sum(counts), 128, 7)
    found = cuda.multiply_grouped(x, factor, cuda.to_words(packed.cuda()), scale.cuda(), code, offsets.cuda())
    true = (x.float() * factor[:, None]).cpu()
    for matrix, count in enumerate(counts):
        if count:
            rows = slice(int(offsets[matrix]), int(offsets[matrix + 1]))
            assert (
                relative(found[rows], reference.matmul(true[rows], packed[matrix], scale[matrix], code)) < 1e-6
            )


@pytest.mark.parametrize(("width", "block"), [(48, 16), (160, 32), (576, 64), (2560, 128), (12288, 128)])
def test_rotations(width: int, block: int) -> None:
    from ernieq.kernels.token_step import cuda

    generator = torch.Generator().manual_seed(8)
    x = torch.randn(3, width, generator=generator) * torch.tensor([1e-3, 1.0, 1e5])[:, None]
    x[1] = 0
    signs = (torch.randint(0, 2, (width,), generator=generator) * 2 - 1).to(torch.int8)
    out = cuda.Rotated(
        torch.full((3, width), torch.nan, dtype=torch.float16, device="cuda"), torch.empty(3, device="cuda")
    )
    cuda.rotate(x.cuda(), signs.cuda(), block, out)
    wanted = step_reference.rotated(x, signs, block)
    assert relative(out.x.float() * out.scale[:, None], wanted) < 5e-4
    assert (out.x[[0, 2]].abs().amax(dim=1) >= 8).all()
    assert (out.x.abs() <= 16).all()
    gate_up = torch.cat((x, x.flip(0)), dim=1) * 1e-4
    cuda.silu_mul_rotate(gate_up.cuda(), signs.cuda(), block, out)
    wanted = step_reference.silu_mul_rotated(gate_up, signs, block)
    assert relative(out.x.float() * out.scale[:, None], wanted) < 5e-4


@pytest.mark.parametrize("with_experts", [True, False])
def test_sums_and_norms(with_experts: bool) -> None:
    from ernieq.kernels.token_step import cuda

    generator = torch.Generator().manual_seed(9)
    hidden, delta = (torch.randn(2, 320, generator=generator) for _ in "ab")
    experts = torch.randn(6, 320, generator=generator) if with_experts else None
    weights = torch.rand(2, 3, generator=generator) if with_experts else None
    norm = torch.rand(320, generator=generator)
    signs = (torch.randint(0, 2, (320,), generator=generator) * 2 - 1).to(torch.int8)
    total, normed = step_reference.add_norm(hidden, delta, experts, weights, norm, 1e-5)
    state = hidden.cuda()
    out = cuda.Rotated(torch.empty(2, 320, dtype=torch.float16, device="cuda"), torch.empty(2, device="cuda"))
    found = torch.empty(2, 320, device="cuda")
    cuda.add_norm_rotate(
        state, delta.cuda(), None if experts is None else experts.cuda(),
        None if weights is None else weights.cuda(), norm.cuda(), 1e-5, signs.cuda(), 64, out, found,
    )  # fmt: skip
    assert relative(state, total) < 1e-6
    assert relative(found, normed) < 1e-6
    assert relative(out.x.float() * out.scale[:, None], step_reference.rotated(normed, signs, 64)) < 5e-4


@pytest.mark.parametrize(("experts", "choices"), [(16, 4), (64, 6), (100, 8)])
def test_routing(experts: int, choices: int) -> None:
    from ernieq.kernels.token_step import cuda

    generator = torch.Generator().manual_seed(10)
    normed, router = (
        torch.randn(5, 192, generator=generator),
        torch.randn(experts, 192, generator=generator) / 14,
    )
    bias = torch.randn(experts, generator=generator) * 0.01
    selected = torch.full((5, choices), -1, dtype=torch.int32, device="cuda")
    weights = torch.empty(5, choices, device="cuda")
    for _ in range(2):  # the counters are ready for a second launch
        cuda.route(normed.cuda(), router.cuda(), bias.cuda(), 1e-12, selected, weights)
    wanted, wanted_weights = step_reference.route(normed, router, bias, 1e-12, choices)
    assert torch.equal(selected.cpu().long(), wanted)
    assert relative(weights, wanted_weights) < 1e-5


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(20, 4, 128), (8, 2, 64), (4, 4, 32)])
@pytest.mark.parametrize("splits", [1, 7])
def test_attention(heads: int, kv_heads: int, head_dim: int, splits: int) -> None:
    from ernieq.kernels.token_step import cuda

    generator = torch.Generator().manual_seed(11)
    position = torch.tensor([0, 5, 99], dtype=torch.int32)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim, generator=generator)
    keys, values = (torch.randn(3, kv_heads, 100, head_dim, generator=generator).half() for _ in "kv")
    turns = torch.rand(100, head_dim // 2, generator=generator) * 6
    angles = torch.stack((turns.cos(), turns.sin()), dim=-1)
    on_gpu = keys.cuda(), values.cuda()
    context = torch.full((3, heads * head_dim), torch.nan, device="cuda")
    workspace = torch.empty(cuda.attend_workspace(3, heads, head_dim, splits), device="cuda")
    moved = position.cuda()
    cuda.attend(qkv.cuda(), angles.cuda(), *on_gpu, moved, context, workspace, splits)
    wanted = step_reference.attend(qkv, angles, keys, values, position)
    assert relative(context, wanted) < 1e-3
    assert torch.allclose(on_gpu[0].cpu().float(), keys.float(), atol=4e-3)
    assert torch.equal(on_gpu[1].cpu(), values)
    cuda.advance(moved)
    assert moved.tolist() == [1, 6, 100]


def test_sums_of_gathered_rows() -> None:
    from ernieq.kernels.token_step import cuda

    generator = torch.Generator().manual_seed(12)
    hidden, rows = torch.randn(5, 1120, generator=generator), torch.randn(15, 1120, generator=generator)
    places = torch.randperm(15, generator=generator).view(5, 3)
    factors = torch.rand(5, 3, generator=generator)
    found = hidden.cuda()
    cuda.add_gathered(found, rows.cuda(), places.cuda(), factors.cuda())
    assert relative(found, hidden + (rows[places] * factors[..., None]).sum(dim=1)) < 1e-6
