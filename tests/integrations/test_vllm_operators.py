"""The operators: against dense products, through torch's compiler, and with a GPU's kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernieq.decode import TrellisEmbedding
from ernieq.integrations.vllm.experts_operator import packed_experts
from ernieq.integrations.vllm.geometry import MatrixPart, part_numbers, part_tiles, read_parts
from ernieq.integrations.vllm.operators import packed_linear, packed_rows
from ernieq.kernels.trellis_matmul.cuda import to_words
from ernieq.trellis import EncodedMatrix, TrellisCode
from tests.decode import fake_kernels
from tests.decode.encoded_matrices import random_matrix, random_signs

Linear = tuple[Tensor, Tensor, Tensor, list[int]]
Experts = tuple[list[Tensor], list[Tensor], list[int]]
EXPERTS, CHOICES = 6, 2

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def some_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def part_of(matrix: EncodedMatrix) -> MatrixPart:
    return MatrixPart(matrix.out_features, matrix.in_features, matrix.code, matrix.rotation_block)


def linear() -> Linear:
    """Parts of 4, 1.5 and 2.5 bits behind each other."""
    signs = random_signs(128)
    matrices = [random_matrix(32 * (i + 1), 128, bits, signs=signs) for i, bits in enumerate((4, 1.5, 2.5))]
    tiles = torch.cat([torch.from_numpy(matrix.packed).flatten() for matrix in matrices])
    scale = torch.cat([torch.from_numpy(matrix.scale) for matrix in matrices])
    return tiles, scale, torch.tensor(signs)[None], part_numbers([part_of(matrix) for matrix in matrices])


def experts() -> Experts:
    signs = random_signs(64), random_signs(48)
    pair, parts = [], []
    for (rows, columns), own in zip(((96, 64), (64, 48)), signs, strict=True):
        matrices = [random_matrix(rows, columns, 2.5, signs=own, seed=expert) for expert in range(EXPERTS)]
        tiles = torch.stack([torch.from_numpy(matrix.packed) for matrix in matrices])
        pair.append([tiles, torch.stack([torch.from_numpy(m.scale) for m in matrices]), torch.tensor(own)])
        parts.append(part_of(matrices[0]))
    return pair[0], pair[1], part_numbers(parts)


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    weights, selected = some_input(tokens, EXPERTS).softmax(-1).topk(CHOICES, dim=-1)
    return weights, selected.int()


def as_words(tensors: list[Tensor]) -> list[Tensor]:
    return [to_words(tensors[0]), *tensors[1:]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_parts_survive_as_numbers() -> None:
    parts = [MatrixPart(32, 64, TrellisCode(bits, 12), 64) for bits in (1.5, 2, 6)]
    assert read_parts(part_numbers(parts)) == parts


def test_tiles_of_parts_are_views_of_one_tensor_in_both_forms() -> None:
    tiles, _, _, numbers = linear()
    for form in (tiles, to_words(tiles)):
        views = part_tiles(form, read_parts(numbers))
        assert sum(view.numel() for view in views) == form.numel()
        assert views[1].data_ptr() == form[views[0].numel() :].data_ptr()
    assert torch.equal(views[2], to_words(part_tiles(tiles, read_parts(numbers))[2]))


def test_the_operators_keep_the_promises_that_they_make_to_torch() -> None:
    ids = torch.tensor([[3, 47], [0, 16]])
    table = random_matrix(48, 64, 6)
    arguments = torch.from_numpy(table.packed).flatten(), torch.from_numpy(table.scale)
    signs, part = torch.tensor(table.signs)[None], part_of(table).numbers()
    gate_up, down, numbers = experts()
    torch.library.opcheck(packed_linear, (some_input(3, 128), *linear()))
    torch.library.opcheck(packed_rows, (ids, *arguments, signs, part, torch.bfloat16))
    torch.library.opcheck(packed_experts, (some_input(5, 64), *routing(5), gate_up, down, numbers, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_takes_the_operators_as_they_are(dtype: torch.dtype) -> None:
    tensors, (gate_up, down, numbers) = linear(), experts()

    def step(x: Tensor, weights: Tensor, selected: Tensor) -> Tensor:
        y: Tensor = packed_linear(x, *tensors)[:, :64]
        added: Tensor = packed_experts(y, weights, selected, gate_up, down, numbers, 0)
        return y + added

    x = some_input(9, 128).to(dtype)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    found = compiled(x, *routing(9))
    assert found.dtype == dtype
    assert torch.equal(found, step(x, *routing(9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_those_of_our_own_embedding(dtype: torch.dtype) -> None:
    table = random_matrix(16 * 70, 64, 6)
    ids = torch.randint(0, 16 * 70, (2, 600), generator=torch.Generator().manual_seed(0))
    arguments = torch.from_numpy(table.packed).flatten(), torch.from_numpy(table.scale)
    rows = packed_rows(ids, *arguments, torch.tensor(table.signs)[None], part_of(table).numbers(), dtype)
    assert torch.equal(rows, TrellisEmbedding(table, dtype)(ids))


def test_no_tokens_give_no_rows() -> None:
    gate_up, down, numbers = experts()
    assert packed_linear(torch.empty(0, 128), *linear()).shape == (0, 192)
    assert packed_experts(torch.empty(0, 64), *routing(0), gate_up, down, numbers, 0).shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_words_go_to_the_kernels_of_a_gpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_kernels.install(monkeypatch)
    tiles, scale, signs, numbers = linear()
    x = some_input(tokens, 128)
    found = packed_linear(x, to_words(tiles), scale, signs, numbers)
    assert relative_error(found, packed_linear(x, tiles, scale, signs, numbers)) < 2e-3
    assert calls == ["rotate"] + 3 * ["multiply" if tokens <= 64 else "decode"]  # rotated once for three parts


@pytest.mark.parametrize(
    ("tokens", "captured", "kernel"),
    [
        (8, 0, "multiply_selected"),
        (9, 0, "multiply_grouped"),
        (385, 0, "decode"),
        (385, 1024, "multiply_grouped"),
    ],
)
def test_experts_that_a_graph_may_capture_never_wait_for_the_gpu(
    tokens: int, captured: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_kernels.install(monkeypatch)
    gate_up, down, numbers = experts()
    x, chosen = some_input(tokens, 64), routing(tokens)
    expected = packed_experts(x, *chosen, gate_up, down, numbers, captured)
    found = packed_experts(x, *chosen, as_words(gate_up), as_words(down), numbers, captured)
    assert relative_error(found, expected) < 2e-3
    assert kernel in calls
    assert len({"multiply_selected", "multiply_grouped", "decode"} & {*calls}) == 1


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 9, 65, 600])
def test_a_gpu_computes_what_the_cpu_does(tokens: int) -> None:
    (tiles, scale, signs, numbers), x = linear(), some_input(tokens, 128)
    found = packed_linear(x.cuda(), to_words(tiles).cuda(), scale.cuda(), signs.cuda(), numbers)
    assert relative_error(found.cpu(), packed_linear(x, tiles, scale, signs, numbers)) < 2e-3
    gate_up, down, numbers = experts()
    x, chosen = some_input(tokens, 64), routing(tokens)
    pair = [[tensor.cuda() for tensor in as_words(tensors)] for tensors in (gate_up, down)]
    expected = packed_experts(x, *chosen, gate_up, down, numbers, 0)
    found = packed_experts(x.cuda(), *(part.cuda() for part in chosen), *pair, numbers, 0)
    assert relative_error(found.cpu(), expected) < 2e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 9, 512])
def test_a_captured_graph_replays_a_step_on_new_input(tokens: int) -> None:
    gate_up, down, numbers = experts()
    pair = [[tensor.cuda() for tensor in as_words(tensors)] for tensors in (gate_up, down)]
    table = random_matrix(48, 64, 6)
    rows = to_words(torch.from_numpy(table.packed).flatten()).cuda(), torch.from_numpy(table.scale).cuda()
    signs, part = torch.tensor(table.signs)[None].cuda(), part_of(table).numbers()
    chosen = [tensor.cuda() for tensor in routing(tokens)]
    ids = torch.zeros(tokens, dtype=torch.int64, device="cuda")

    def step() -> Tensor:
        x = packed_rows(ids, *rows, signs, part, torch.bfloat16)
        y = packed_experts(x, *chosen, *pair, numbers, 512 * CHOICES)
        logits: Tensor = packed_linear(y, *rows, signs, part)
        return logits

    step()  # kernels are compiled before a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    ids.copy_(torch.arange(tokens) % 48)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, step(), rtol=1e-2, atol=1e-2)
