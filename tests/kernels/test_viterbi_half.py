"""The search in float16: its reference against the integers', and the GPU against its reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ernieq.errors import NonFiniteError, ShapeError, UsageError
from ernieq.kernels.viterbi import encode_tiles, half_reference, search_tiles
from ernieq.trellis import TrellisCode, ring_states, state_values

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the search has nowhere to run"
)


def gaussian(tiles: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((tiles, 256)) * 148).astype(np.float32)


def error(symbols: np.ndarray, targets: np.ndarray, code: TrellisCode) -> float:
    values = state_values(code.state_bits)[ring_states(symbols, code)].astype(np.float64)
    return float(np.square(values - targets).mean())


@pytest.mark.parametrize(("bits", "tiles"), [(1.5, 24), (2, 24), (2.5, 24), (3, 24), (4, 24), (5, 24), (7, 6)])
def test_float16_loses_nothing_against_integers(bits: float, tiles: int) -> None:
    code, targets = TrellisCode(bits, 14 if bits == 7 else 10), gaussian(tiles, 0)
    half = error(half_reference.encode_tiles(targets, code, 256), targets, code)
    integers = error(encode_tiles(targets, code), targets, code)
    assert half < 1.01 * integers


def test_a_target_beyond_the_codebook_takes_its_end() -> None:
    code, targets = TrellisCode(2, 10), gaussian(1, 1)
    targets[0, 10] = 1e9
    symbols = half_reference.encode_tiles(targets, code, 256)
    assert state_values(10)[ring_states(symbols, code)][0, 10] > 300


def test_tensors_on_the_cpu_go_to_the_compiled_search() -> None:
    code, targets = TrellisCode(3, 10), gaussian(3, 2)
    found = search_tiles(torch.from_numpy(targets), code, first_pass_steps=96)
    assert np.array_equal(found.numpy(), encode_tiles(targets, code, first_pass_steps=96))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("bits", "state_bits"),
    [
        (2, 10),
        (2, 11),
        (4, 10),
        (5, 10),
        (2, 12),
        (3, 12),
        (6, 12),
        (3, 13),
        (6, 14),
        (2, 16),
        (3, 16),
        (4, 16),
        (1.5, 10),
        (2.5, 10),
        (3.5, 11),
        (4.5, 10),
        (1.5, 12),
        (5.5, 12),
        (2.5, 13),
        (7, 14),
        (1.5, 16),
        (2.5, 16),
        (3.5, 16),
        (5.5, 16),
        (6, 16),
        (7, 16),
        (8, 16),
    ],
)
@pytest.mark.parametrize("first_pass", [256, 96])
def test_gpu_gives_the_references_symbols(bits: float, state_bits: int, first_pass: int) -> None:
    code, targets = TrellisCode(bits, state_bits), gaussian(3 if state_bits < 14 else 1, 3)
    targets[0, :4] = [0, 1e6, -1e6, 1e-3]
    found = search_tiles(torch.from_numpy(targets).cuda(), code, first_pass_steps=first_pass)
    assert np.array_equal(found.cpu().numpy(), half_reference.encode_tiles(targets, code, first_pass))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [2, 2.5])
def test_gpu_gives_a_tile_the_same_symbols_in_any_company(bits: float) -> None:
    from ernieq.kernels.viterbi import cuda

    code = TrellisCode(bits, 12)
    targets = torch.from_numpy(gaussian(5000, 4)).cuda()
    together = cuda.encode_tiles(targets, code, first_pass_steps=256)
    in_parts = cuda.encode_tiles(targets, code, first_pass_steps=256, workspace_bytes=1)
    assert torch.equal(together, in_parts)
    assert torch.equal(together[4242:4243], search_tiles(targets[4242:4243], code))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3])
def test_gpu_with_little_shared_memory_gives_the_same_symbols(
    bits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernieq.kernels.viterbi import cuda

    code, targets = TrellisCode(bits, 12), torch.from_numpy(gaussian(8, 5)).cuda()
    wanted = search_tiles(targets, code)
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin  # type: ignore[attr-defined,unused-ignore]
    one = 4 * code.nodes_before(0)
    monkeypatch.setattr(cuda, "_DECLARED_BYTES", limit - one - 4)  # room for one buffer, not for two
    cuda._prepared.cache_clear()
    try:
        assert cuda._prepared(code, torch.cuda.current_device()).layout.shared_bytes == one
        assert torch.equal(search_tiles(targets, code), wanted)
    finally:
        cuda._prepared.cache_clear()


@pytest.mark.gpu
@needs_gpu
def test_gpu_refuses_what_the_cpu_refuses() -> None:
    code = TrellisCode(2, 10)
    with pytest.raises(ShapeError):
        search_tiles(torch.zeros(2, 255, device="cuda"), code)
    with pytest.raises(UsageError):
        search_tiles(torch.zeros(2, 256, device="cuda"), code, first_pass_steps=3)
    with pytest.raises(NonFiniteError):
        search_tiles(torch.full((2, 256), torch.nan, device="cuda"), code)
