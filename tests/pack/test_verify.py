"""Verifying reads every byte once, and a comparison with the source finds what a hash can't."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from ernieq.errors import VerificationError
from ernieq.kernels import Backend, matrix_rows
from ernieq.pack import Manifest, PackedReader, PackedWriter, RawTensor, Source, VerifyReport, verify_packed
from ernieq.trellis import EncodedMatrix
from ernieq.trellis.distortion import SQUARED_ERROR, largest_relative_error, usual_relative_error
from tests.pack.packed_factory import EXTRA, NORM, ROUTER, random_matrix, write_packed

GATE, EMBED = "model.layers.0.mlp.gate_proj", "model.embed_tokens"
NORM_NAME, ROUTER_NAME, CARRIED = (
    "model.norm.weight",
    "model.layers.1.mlp.gate.weight",
    "model.mtp_extra.weight",
)


@dataclass(frozen=True)
class FakeSource:
    """Tensors in memory in place of a source checkpoint."""

    tensors: dict[str, RawTensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def info(self, name: str, /) -> RawTensor:
        return self.tensors[name]

    def read_bytes(self, name: str, /) -> memoryview:
        return memoryview(self.tensors[name].data)

    def release(self) -> None:
        pass


def bf16(values: np.ndarray) -> RawTensor:
    """Values cut to bfloat16."""
    upper = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
    return RawTensor("BF16", values.shape, upper.tobytes())


def matrices() -> dict[str, EncodedMatrix]:
    return {
        GATE: random_matrix(48, 64, 4, block=64, seed=1),
        EMBED: random_matrix(64, 32, 2.5, state_bits=12, seed=2),
    }


def source_of(modules: dict[str, EncodedMatrix], noise: float = 0.0) -> FakeSource:
    """The source that these matrices encode, up to Gaussian noise relative to each one's norm."""
    random = np.random.default_rng(5)
    tensors = {NORM_NAME: NORM, ROUTER_NAME: ROUTER, CARRIED: EXTRA}
    for name, matrix in modules.items():
        weight = matrix_rows.decode(matrix, backend=Backend.REFERENCE).astype(np.float64)
        weight += noise * np.sqrt(np.mean(weight**2)) * random.standard_normal(weight.shape)
        tensors[f"{name}.weight"] = bf16(weight)
    return FakeSource(tensors)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "packed", matrices())


def relative_errors(report: VerifyReport) -> dict[str, float]:
    assert report.errors is not None
    return {error.name: error.relative_error for error in report.errors}


def bytes_read() -> int:
    """Bytes that this process has asked files for, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count what is read")
@pytest.mark.parametrize("compare", [False, True])
def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compare: bool) -> None:
    modules = {
        f"model.layers.{layer}.mlp.gate_proj": random_matrix(512, 512, 4, seed=layer) for layer in range(9)
    }
    path = write_packed(tmp_path / "packed", modules, shard_bytes=400_000)
    source = source_of(modules, 0.01) if compare else None
    matrix_rows.decode(next(iter(modules.values())))  # loads the kernels, whose file is read too
    monkeypatch.setattr(np, "memmap", None)  # nothing is read past the counter
    own = bytes_read()
    own = bytes_read() - own  # what the counting itself reads
    before = bytes_read()
    verify_packed(path, source=source)
    count = bytes_read() - before - own
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    del files["README.md"]  # a card has no hash
    assert len(files) > 4
    assert count == sum(files.values())


def test_progress_counts_every_byte_of_shards_and_files(packed: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    verify_packed(packed, on_progress=lambda name, done, total: seen.append((name, done, total)))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == (packed / "model.safetensors").stat().st_size


def test_the_memory_of_a_check_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    big = random_matrix(4096, 2048, 8, seed=3)
    path = write_packed(tmp_path / "packed", {GATE: big})
    tracemalloc.start()
    verify_packed(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert big.packed.nbytes > 8_000_000
    assert peak < 4_000_000


@pytest.mark.parametrize("backend", [Backend.AUTO, Backend.REFERENCE, Backend.SCALAR])
def test_the_relative_error_is_that_of_the_noise(packed: Path, backend: Backend) -> None:
    noise = 0.1
    errors = relative_errors(verify_packed(packed, source=source_of(matrices(), noise), backend=backend))
    assert set(errors) == {f"{GATE}.weight", f"{EMBED}.weight", NORM_NAME, ROUTER_NAME, CARRIED}
    for name in (GATE, EMBED):
        assert errors[f"{name}.weight"] == pytest.approx(noise / math.hypot(1, noise), rel=0.05)
    assert errors[NORM_NAME] == errors[ROUTER_NAME] == errors[CARRIED] == 0


def test_an_error_beyond_what_the_bits_cost_is_flagged_and_one_beyond_any_correction_refused(
    packed: Path,
) -> None:
    usual, largest = usual_relative_error(4), largest_relative_error(4)
    assert SQUARED_ERROR[4] ** 0.5 < usual < largest < 1
    for error, flagged in ((0.9 * usual, False), (1.1 * usual, True)):
        report = verify_packed(packed, source=source_of(matrices(), error))
        assert report.errors is not None
        assert {e.name: e.flagged for e in report.errors}[f"{GATE}.weight"] == flagged
    with pytest.raises(VerificationError, match=r"gate_proj\.weight is off by 0\.7.* encoded wrongly"):
        verify_packed(packed, source=source_of(matrices(), 0.95))


Fault = Callable[[EncodedMatrix], EncodedMatrix]
FAULTS: dict[str, Fault] = {
    "signs of others": lambda matrix: replace(matrix, signs=np.roll(matrix.signs, 1)),
    "no rotation": lambda matrix: replace(matrix, rotation_block=1),
    "rows in another order": lambda matrix: replace(
        matrix, packed=matrix.packed[::-1], scale=matrix.scale[::-1]
    ),
    "scales twice too large": lambda matrix: replace(matrix, scale=matrix.scale * np.float16(2)),
    "scales negated": lambda matrix: replace(matrix, scale=-matrix.scale),
    "units in another order": lambda matrix: replace(matrix, packed=matrix.packed[..., ::-1]),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_an_encoder_is_found(
    tmp_path: Path, fault: Callable[[EncodedMatrix], EncodedMatrix]
) -> None:
    right = matrices()
    wrong = write_packed(tmp_path / "wrong", {**right, GATE: fault(right[GATE])})
    verify_packed(wrong)  # all bytes are legal
    with pytest.raises(VerificationError, match=r"gate_proj\.weight is off by"):
        verify_packed(wrong, source=source_of(right))


@pytest.mark.parametrize("change", ["missing", "added"])
def test_a_tensor_that_only_one_side_has_is_named(packed: Path, change: str) -> None:
    source = source_of(matrices())
    if change == "missing":
        source.tensors["model.layers.9.lost.weight"] = NORM
    else:
        del source.tensors[ROUTER_NAME]
    match = {"missing": r"layers\.9\.lost\.weight of the source is missing", "added": "is not in the source"}
    with pytest.raises(VerificationError, match=match[change]):
        verify_packed(packed, source=source)


@pytest.mark.parametrize("name", [NORM_NAME, ROUTER_NAME, CARRIED])
def test_a_kept_or_carried_tensor_that_differs_in_one_bit_is_named(packed: Path, name: str) -> None:
    source = source_of(matrices())
    raw = source.tensors[name]
    changed = bytearray(raw.data)
    changed[-1] ^= 1
    source.tensors[name] = replace(raw, data=bytes(changed))
    with pytest.raises(VerificationError, match=rf"{name} is listed as (kept|carried), but differs"):
        verify_packed(packed, source=source)


@pytest.mark.parametrize("name", [NORM_NAME, f"{GATE}.weight"])
def test_a_tensor_of_another_shape_or_dtype_is_named(packed: Path, name: str) -> None:
    source = source_of(matrices())
    raw = source.tensors[name]
    source.tensors[name] = replace(raw, shape=(2, math.prod(raw.shape) // 2))
    with pytest.raises(VerificationError, match=rf"{name} is BF16 .* in the source it is BF16 \[2, "):
        verify_packed(packed, source=source)
    if name == NORM_NAME:
        source.tensors[name] = replace(raw, dtype="F16")
        with pytest.raises(VerificationError, match=rf"{name} is BF16 .* in the source it is F16"):
            verify_packed(packed, source=source)


def test_a_tuned_tensor_may_differ_and_its_error_is_told(tmp_path: Path) -> None:
    modules = matrices()
    tuned = bf16(np.full(32, 1.25))
    with PackedWriter(tmp_path / "packed") as writer:
        for name, matrix in modules.items():
            writer.add_encoded(name, matrix)
        writer.add_tensor(NORM_NAME, tuned, tuned=True)
        writer.add_tensor(ROUTER_NAME, ROUTER)
        writer.add_tensor(CARRIED, EXTRA, carried=True)
        writer.finish({"model_type": "ernie4_5"}, Manifest("0.1.0", Source("x"), {}, seed=0))
    errors = relative_errors(verify_packed(tmp_path / "packed", source=source_of(modules)))
    assert errors[NORM_NAME] == pytest.approx(0.25)


def test_a_source_of_zeros_has_no_relative_error_unless_something_is_stored_in_its_place(
    tmp_path: Path,
) -> None:
    zeros = replace(random_matrix(32, 32, 2), scale=np.full(32, 2.0**-24, np.float16))
    source = source_of({GATE: zeros})
    source.tensors[f"{GATE}.weight"] = bf16(np.zeros((32, 32)))
    path = write_packed(tmp_path / "zeros", {GATE: zeros})
    assert relative_errors(verify_packed(path, source=source))[f"{GATE}.weight"] == 0
    path = write_packed(tmp_path / "numbers", {GATE: random_matrix(32, 32, 2)})
    with pytest.raises(VerificationError, match="is off by inf"):
        verify_packed(path, source=source)


def test_a_source_that_is_not_finite_is_refused(packed: Path) -> None:
    source = source_of(matrices())
    weight = np.ones((48, 64))
    weight[3, 4] = np.nan
    source.tensors[f"{GATE}.weight"] = bf16(weight)
    with pytest.raises(VerificationError, match=r"gate_proj\.weight is off by nan"):
        verify_packed(packed, source=source)


def test_a_wrong_hash_is_told_before_what_it_explains(packed: Path) -> None:
    entry = PackedReader(packed).info(NORM_NAME)
    raw = bytearray((packed / "model.safetensors").read_bytes())
    raw[entry.begin : entry.begin + 2] = b"\xc0\x7f"  # a NaN
    (packed / "model.safetensors").write_bytes(raw)
    with pytest.raises(VerificationError, match="sha256"):
        verify_packed(packed)


def test_a_tensor_that_the_model_has_no_place_for_is_named(packed: Path) -> None:
    shapes = {f"{GATE}.weight": (48, 64), f"{EMBED}.weight": (64, 32), NORM_NAME: (32,)}
    with pytest.raises(VerificationError, match=f"{ROUTER_NAME} has no place in the model"):
        verify_packed(packed, expected_shapes=shapes)
    verify_packed(packed, expected_shapes={**shapes, ROUTER_NAME: (3, 32)})  # carried ones have none


def test_any_bytes_are_a_legal_ring(packed: Path) -> None:
    """Nothing in a tile can be wrong; what can be checked is its shape, dtype and rate, which opening does."""
    reader = PackedReader(packed)
    rate = json.loads((packed / "config.json").read_text())["quantization_config"]["modules"][GATE]["bits"]
    assert reader.info(f"{GATE}.weight_packed").shape == (3, 4, 16 * rate)
    noise = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, reader.encoded(GATE).packed.shape)
    wrong = replace(reader.encoded(GATE), packed=noise.astype(np.int16))
    assert np.isfinite(matrix_rows.decode(wrong)).all()
