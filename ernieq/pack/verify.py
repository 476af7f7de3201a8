"""Checking a packed checkpoint to the last byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ernieq.errors import VerificationError
from ernieq.pack.header import TensorEntry
from ernieq.pack.paths import locate
from ernieq.pack.reader import PackedReader

# on_progress(what, done, total): both in bytes.
Progress = Callable[[str, int, int], None]

_READ_BYTES = 1024 * 1024
_CHECK_ELEMENTS = 1 << 22
# Stored 16-bit and 32-bit floats are finite unless all exponent bits are set.
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and found to be in order.

    Args:
        path: the directory.
        format_version: of the packed format.
        shards: number of shards.
        shard_bytes: their total length.
        files: number of copied files whose hash was checked.
        quantized: number of quantized matrices.
        kept: number of tensors stored unchanged.
        carried: number of tensors carried over that the model does not know.
        tuned: number of tensors whose numbers were tuned after rounding.
    """

    path: str
    format_version: str
    shards: int
    shard_bytes: int
    files: int
    quantized: int
    kept: int
    carried: int
    tuned: int


def verify_packed(
    path: Path | str,
    *,
    expected_shapes: Mapping[str, tuple[int, ...]] | None = None,
    on_progress: Progress | None = None,
) -> VerifyReport:
    """Check every MUST of FORMAT.md: structure, hashes, coverage, finite scales.

    Args:
        path: the directory.
        expected_shapes: shape of every parameter that the model of this configuration has, by source name; each
            must be there with that shape. The caller brings it because this package knows no model.
        on_progress: called with a file name, bytes done and bytes in all.

    Raises:
        FormatError: the structure is illegal.
        VerificationError: the structure is legal, but a hash, the coverage, a shape or a number is wrong.
    """
    reader = PackedReader(path)
    _check_coverage(reader)
    if expected_shapes is not None:
        _check_shapes(reader, expected_shapes)
    shard_bytes = _check_hashes(reader, on_progress)
    _check_numbers(reader)
    coverage = reader.manifest.coverage
    assert coverage is not None, "a manifest that was read has its coverage"
    return VerifyReport(
        path=str(path),
        format_version=reader.format_version,
        shards=len(reader.shard_files()),
        shard_bytes=shard_bytes,
        files=len(reader.manifest.files),
        quantized=len(coverage.quantized),
        kept=len(coverage.kept),
        carried=len(coverage.carried),
        tuned=len(coverage.tuned),
    )


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def _check_coverage(reader: PackedReader) -> None:
    coverage = reader.manifest.coverage
    assert coverage is not None
    fates = (
        ("quantized", coverage.quantized),
        ("kept", coverage.kept),
        ("carried", coverage.carried),
        ("tuned", coverage.tuned),
    )
    seen: dict[str, str] = {}
    for fate, names in fates:
        for name in names:
            if name in seen:
                raise VerificationError(f"{name} is listed in the manifest as both {seen[name]} and {fate}")
            seen[name] = fate
    quantized = {f"{module}.weight" for module in reader.modules()}
    _same_names(quantized, set(coverage.quantized), "quantized")
    _same_names(
        set(reader.tensors()), {*coverage.kept, *coverage.carried, *coverage.tuned}, "kept, carried or tuned"
    )


def _same_names(stored: set[str], listed: set[str], fate: str) -> None:
    for name in sorted(listed - stored):
        raise VerificationError(f"{name} is listed in the manifest as {fate}, but is not stored so")
    for name in sorted(stored - listed):
        raise VerificationError(f"{name} is stored, but not listed in the manifest as {fate}")


def _check_shapes(reader: PackedReader, expected_shapes: Mapping[str, tuple[int, ...]]) -> None:
    found: dict[str, tuple[int, ...]] = {
        f"{module}.weight": reader.shape_of(module) for module in reader.modules()
    }
    found.update((name, reader.info(name).shape) for name in reader.tensors())
    for name, shape in expected_shapes.items():
        if name not in found:
            raise VerificationError(
                f"{name} is missing: the configuration calls for it with shape {list(shape)}"
            )
        if found[name] != tuple(shape):
            raise VerificationError(
                f"{name} has shape {list(found[name])}; the configuration calls for {list(shape)}"
            )


def _check_hashes(reader: PackedReader, on_progress: Progress | None) -> int:
    manifest = reader.manifest
    stored = set(reader.shard_files())
    for name in sorted(stored ^ set(manifest.shards)):
        where = "the manifest has no hash of it" if name in stored else "no tensor is in it"
        raise VerificationError(f"shard {name} is not accounted for: {where}")
    for name in sorted(path.name for path in reader.path.glob("*.safetensors")):
        if name not in stored:
            raise VerificationError(f"{name} lies in {reader.path}, but belongs to no index and no manifest")
    sizes = {name: locate(reader.path, name).stat().st_size for name in sorted(stored)}
    total, done = sum(sizes.values()), 0

    def advance(name: str) -> Callable[[int], None]:
        def report(count: int) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(name, done, total)

        return report

    for name in sizes:
        _compare_hash(reader, name, manifest.shards[name], advance(name))
    for name, digest in manifest.files.items():
        _compare_hash(reader, name, digest, None)
    return total


def _compare_hash(
    reader: PackedReader, name: str, expected: str, on_bytes: Callable[[int], None] | None
) -> None:
    try:
        found = file_sha256(locate(reader.path, name), on_bytes)
    except OSError as error:
        raise VerificationError(f"{reader.path / name} can't be read: {error.strerror}") from None
    if found != expected:
        raise VerificationError(f"{name} has sha256 {found[:16]}..., but the manifest says {expected[:16]}...")


def _check_numbers(reader: PackedReader) -> None:
    for module in reader.modules():
        reader.encoded(module)  # refuses scales that are zero or not finite
        reader.release()
    coverage = reader.manifest.coverage
    assert coverage is not None
    carried = set(coverage.carried)
    for entry in _kept_floats(reader, carried):
        dtype, exponent = _EXPONENT[entry.dtype]
        bits = np.frombuffer(reader.tensor(entry.name).data, dtype=dtype)
        for start in range(0, bits.size, _CHECK_ELEMENTS):
            piece = bits[start : start + _CHECK_ELEMENTS]
            if ((piece & exponent) == exponent).any():
                raise VerificationError(f"{entry.name} holds a NaN or infinite number")
        reader.release()


def _kept_floats(reader: PackedReader, carried: set[str]) -> Iterable[TensorEntry]:
    entries = (reader.info(name) for name in reader.tensors() if name not in carried)
    return (entry for entry in entries if entry.dtype in _EXPONENT and entry.nbytes)
