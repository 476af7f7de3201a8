"""Where stored tensors go: what the processes of a group hold gives the whole layer together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ernieq.errors import MissingTensorError, NonFiniteError, UnsupportedModelError
from ernieq.integrations.vllm.expert_storage import ExpertStorage
from ernieq.integrations.vllm.experts_operator import packed_experts
from ernieq.integrations.vllm.geometry import part_numbers
from ernieq.integrations.vllm.operators import packed_linear
from ernieq.integrations.vllm.slices import slice_columns, slice_rows
from ernieq.integrations.vllm.storage import MergedStorage, StoredPart
from ernieq.pack import ModuleSpec
from ernieq.trellis import EncodedMatrix
from tests.decode.encoded_matrices import plain_weight, random_matrix, random_signs
from tests.integrations.test_vllm_slices import stored

NAMES = ("weight_packed", "weight_scale", "weight_signs")


def spec_of(matrix: EncodedMatrix) -> ModuleSpec:
    return ModuleSpec(matrix.code, matrix.rotation_block)


def fill(storage: MergedStorage, matrices: list[EncodedMatrix | Tensor]) -> dict[str, Tensor]:
    tensors = storage.new_tensors(torch.float32)
    for index, matrix in enumerate(matrices):
        if isinstance(matrix, Tensor):
            storage.place("weight", tensors["weight"], index, matrix)
            continue
        for name, tensor in zip(NAMES, stored(matrix), strict=True):
            storage.place(name, tensors[name], index, tensor)
    return tensors


def multiply(storage: MergedStorage, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    tiles, scale, signs = storage.finish(*(tensors[name] for name in NAMES))
    out: Tensor = packed_linear(x, tiles, scale, signs, part_numbers(storage.matrices))
    return out


def some_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def merged(size: int = 1, rank: int = 0) -> tuple[MergedStorage, list[EncodedMatrix]]:
    """Three parts of different rates and heights that read one input."""
    signs = random_signs(128)
    matrices = [random_matrix(96, 128, 4, signs=signs), random_matrix(32, 128, 4, signs=signs, seed=1)]
    matrices.append(random_matrix(32, 128, 2.5, signs=signs, seed=2))
    parts = [
        StoredPart(slice_rows(f"p{index}", m.out_features, 128, rank, size), spec_of(m))
        for index, m in enumerate(matrices)
    ]
    return MergedStorage(parts), matrices


def test_a_merged_layer_multiplies_with_each_of_its_parts() -> None:
    storage, matrices = merged()
    x = some_input(5, 128)
    expected = torch.cat([x @ plain_weight(matrix).T for matrix in matrices], dim=1)
    torch.testing.assert_close(multiply(storage, fill(storage, [*matrices]), x), expected, rtol=1e-4, atol=1e-4)


def test_equal_signs_are_kept_once_and_different_ones_part_by_part() -> None:
    storage, matrices = merged()
    tensors = fill(storage, [*matrices])
    assert storage.finish(*(tensors[name] for name in NAMES))[2].shape == (1, 128)
    other = random_matrix(32, 128, 2.5, signs=random_signs(128, 9), seed=2)
    tensors = fill(storage, [*matrices[:2], other])
    assert storage.finish(*(tensors[name] for name in NAMES))[2].shape == (3, 128)
    x = some_input(4, 128)
    expected = torch.cat([x @ plain_weight(matrix).T for matrix in (*matrices[:2], other)], dim=1)
    torch.testing.assert_close(multiply(storage, tensors, x), expected, rtol=1e-4, atol=1e-4)


def test_two_processes_that_hold_rows_give_the_outputs_of_one() -> None:
    x = some_input(3, 128)
    storage, matrices = merged()
    whole = multiply(storage, fill(storage, [*matrices]), x).split([96, 32, 32], dim=1)
    halves = []
    for rank in range(2):
        storage, _ = merged(2, rank)
        halves.append(multiply(storage, fill(storage, [*matrices]), x).split([48, 16, 16], dim=1))
    for part, one in enumerate(whole):
        torch.testing.assert_close(torch.cat([half[part] for half in halves], dim=1), one, rtol=0, atol=1e-5)


def test_the_sums_of_processes_that_hold_columns_give_the_outputs_of_one() -> None:
    matrix = random_matrix(48, 384, 3)
    x = some_input(3, 384)
    total = torch.zeros(3, 48)
    for rank in range(3):
        storage = MergedStorage([StoredPart(slice_columns("o", 48, 384, 128, rank, 3), spec_of(matrix))])
        total += multiply(storage, fill(storage, [matrix]), x[:, 128 * rank : 128 * (rank + 1)])
    torch.testing.assert_close(total, x @ plain_weight(matrix).T, rtol=1e-4, atol=1e-4)


def test_plain_parts_of_a_merged_layer_keep_their_place() -> None:
    plain = some_input(32, 128)
    matrices: list[EncodedMatrix | Tensor] = [
        random_matrix(16, 128, 2),
        plain,
        random_matrix(48, 128, 3, seed=3),
    ]
    specs = [None if isinstance(m, Tensor) else spec_of(m) for m in matrices]
    parts = [
        StoredPart(slice_rows(f"p{index}", rows, 128, 0, 1), spec)
        for index, (rows, spec) in enumerate(zip((16, 32, 48), specs, strict=True))
    ]
    storage = MergedStorage(parts)
    tensors = fill(storage, matrices)
    x = some_input(2, 128)
    out = storage.join(multiply(storage, tensors, x), x @ tensors["weight"].T)
    weights = [m if isinstance(m, Tensor) else plain_weight(m) for m in matrices]
    torch.testing.assert_close(out, x @ torch.cat(weights).T, rtol=1e-4, atol=1e-4)


def test_rows_that_vllm_adds_to_a_vocabulary_decode_to_zero() -> None:
    matrix = random_matrix(48, 64, 6)
    storage = MergedStorage([StoredPart(slice_rows("e", 48, 64, 0, 1), spec_of(matrix), padded_rows=64)])
    out = multiply(storage, fill(storage, [matrix]), some_input(2, 64))
    assert out.shape == (2, 64)
    assert not out[:, 48:].any()
    assert out[:, :48].all()


def test_a_part_that_was_never_loaded_is_named() -> None:
    storage, matrices = merged()
    tensors = fill(storage, [*matrices[:2]])
    with pytest.raises(MissingTensorError, match=r"^p2\.weight_packed is not in the checkpoint \(is one of"):
        storage.finish(*(tensors[name] for name in NAMES))


def test_tiles_that_were_never_loaded_are_noticed_though_their_scale_was() -> None:
    storage, matrices = merged()
    tensors = fill(storage, [*matrices[:2]])
    for name, tensor in list(zip(NAMES, stored(matrices[2]), strict=True))[1:]:
        storage.place(name, tensors[name], 2, tensor)
    with pytest.raises(MissingTensorError, match=r"^p2\.weight_packed is not in the checkpoint"):
        storage.finish(*(tensors[name] for name in NAMES))


def test_a_scale_of_zero_is_refused() -> None:
    storage, matrices = merged()
    tensors = fill(storage, [*matrices])
    tensors["weight_scale"][5] = 0
    with pytest.raises(
        MissingTensorError, match=r"^p0\.weight_scale is not in the checkpoint, or holds a zero"
    ):
        storage.finish(*(tensors[name] for name in NAMES))


def test_a_scale_that_is_not_finite_is_refused() -> None:
    storage, matrices = merged()
    tensors = fill(storage, [*matrices])
    tensors["weight_scale"][100] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^p1\.weight_scale"):
        storage.finish(*(tensors[name] for name in NAMES))


def test_a_plain_weight_of_a_module_that_is_listed_as_packed_is_refused() -> None:
    storage, _ = merged()
    with pytest.raises(MissingTensorError, match=r"^p1\.weight is in the checkpoint, but its config\.json"):
        storage.place("weight", torch.zeros(1), 1, torch.zeros(32, 128))


def some_experts(count: int, hidden: int, width: int) -> list[dict[str, EncodedMatrix]]:
    inputs, inner = random_signs(hidden, 1), random_signs(width, 2)
    return [
        {
            "w1": random_matrix(width, hidden, 2, signs=inputs, seed=3 * expert),
            "w3": random_matrix(width, hidden, 2, signs=inputs, seed=3 * expert + 1),
            "w2": random_matrix(hidden, width, 2.5, signs=inner, seed=3 * expert + 2),
        }
        for expert in range(count)
    ]


def dense_experts(
    experts: list[dict[str, EncodedMatrix]], x: Tensor, weights: Tensor, selected: Tensor
) -> Tensor:
    """The weighted sum, token by token, from plain weights."""
    plain = [{shard: plain_weight(matrix) for shard, matrix in expert.items()} for expert in experts]
    total = torch.zeros_like(x)
    for token, choice in (
        (token, choice) for token in range(x.shape[0]) for choice in range(selected.shape[1])
    ):
        expert = plain[int(selected[token, choice])]
        inner = functional.silu(x[token] @ expert["w1"].T) * (x[token] @ expert["w3"].T)
        total[token] += weights[token, choice] * (inner @ expert["w2"].T)
    return total


def fill_experts(storage: ExpertStorage, experts: list[dict[str, EncodedMatrix]]) -> dict[str, Tensor]:
    tensors = storage.new_tensors()
    for expert, matrices in enumerate(experts):
        for shard, matrix in matrices.items():
            for name, tensor in zip(NAMES, stored(matrix), strict=True):
                full = f"{'w2' if shard == 'w2' else 'w13'}_{name}"
                storage.place(full, tensors[full], expert, shard, tensor)
    return tensors


def finished(storage: ExpertStorage, tensors: dict[str, Tensor]) -> list[list[Tensor]]:
    return [
        list(storage.finish(prefix, *(tensors[f"{prefix}_{name}"] for name in NAMES)))
        for prefix in ("w13", "w2")
    ]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_experts_of_all_processes_together_are_the_dense_ones(size: int, tokens: int) -> None:
    experts = some_experts(4, 64, 256)
    x = some_input(tokens, 64)
    weights, selected = some_input(tokens, 4).softmax(-1).topk(2, dim=-1)
    total = torch.zeros_like(x)
    for rank in range(size):
        spec = spec_of(experts[0]["w1"]), spec_of(experts[0]["w2"])
        storage = ExpertStorage("e", spec, 4, 64, 256, rank, size)
        pair = finished(storage, fill_experts(storage, experts))
        total += packed_experts(x, weights, selected, *pair, part_numbers([storage.gate_up, storage.down]), 0)
    torch.testing.assert_close(total, dense_experts(experts, x, weights, selected), rtol=1e-4, atol=1e-4)


def test_experts_whose_signs_differ_are_refused() -> None:
    experts = some_experts(3, 64, 48)
    experts[2]["w3"] = random_matrix(48, 64, 2, signs=random_signs(64, 7))
    storage = ExpertStorage("e", (spec_of(experts[0]["w1"]), spec_of(experts[0]["w2"])), 3, 64, 48, 0, 1)
    with pytest.raises(UnsupportedModelError, match=r"weight_signs differs between experts"):
        finished(storage, fill_experts(storage, experts))


def test_an_expert_that_was_never_loaded_is_noticed() -> None:
    experts = some_experts(3, 64, 48)
    storage = ExpertStorage("e", (spec_of(experts[0]["w1"]), spec_of(experts[0]["w2"])), 3, 64, 48, 0, 1)
    with pytest.raises(MissingTensorError, match=r"^a gate_proj\.weight_packed of e is not in the"):
        finished(storage, fill_experts(storage, experts[:2]))
