"""Checking a packed checkpoint to the last byte, and against its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ernieq.errors import VerificationError
from ernieq.kernels import Backend
from ernieq.pack.compare import Comparison, SourceTensors, TensorError
from ernieq.pack.numbers import illegal_number
from ernieq.pack.paths import locate
from ernieq.pack.reader import PackedReader
from ernieq.pack.sweep import Piece, Sweep

# on_progress(what, done, total): both in bytes.
Progress = Callable[[str, int, int], None]


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
        errors: relative error of every tensor, if there was a source to compare with.
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
    errors: tuple[TensorError, ...] | None = None


def verify_packed(
    path: Path | str | PackedReader,
    *,
    expected_shapes: Mapping[str, tuple[int, ...]] | None = None,
    source: SourceTensors | None = None,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> VerifyReport:
    """Check every MUST of FORMAT.md: structure, hashes, coverage, legal numbers. Every byte is read once.

    Args:
        path: the directory, or a reader that has just opened it.
        expected_shapes: shape of every parameter that the model of this configuration has, by source name; each
            must be there with that shape. The caller brings it because this package knows no model.
        source: the checkpoint that it was made of. Its list of tensors must then be that of the manifest, kept
            and carried tensors must be equal to the last bit, and no matrix may be further off than
            `largest_relative_error` of its bits.
        backend: implementation of the decoding, for the comparison with the source.
        threads: of the decoding; all processors by default.
        on_progress: called with a file name, bytes done and bytes in all.

    Raises:
        FormatError: the structure is illegal.
        VerificationError: the structure is legal, but a hash, the coverage, a shape or a number is wrong.
        BackendUnavailableError: the backend can't run here.
    """
    reader = path if isinstance(path, PackedReader) else PackedReader(path)
    _check_coverage(reader)
    if expected_shapes is not None:
        _check_shapes(reader, expected_shapes)
    _check_files(reader)
    progress = _Counter(reader, on_progress)
    sweep = Sweep(reader, progress.count)
    comparison = None
    if source is not None:
        comparison = Comparison(reader, source, sweep, backend=backend, threads=threads)
    for name in reader.shard_files():
        progress.name = name
        _check_shard(reader, name, sweep, comparison)
    for name, expected in reader.manifest.files.items():
        _compare_hashes(name, sweep.file(name), expected)
    return _report(reader, progress.shard_bytes, comparison)


class _Counter:
    """Adds up the bytes read of all files, beginning with the headers, which were read at opening."""

    def __init__(self, reader: PackedReader, on_progress: Progress | None) -> None:
        sizes = {name: locate(reader.path, name).stat().st_size for name in reader.shard_files()}
        self.shard_bytes = sum(sizes.values())
        self.name = next(iter(sizes))
        self._on_progress = on_progress
        self._total = self.shard_bytes + sum(
            locate(reader.path, name).stat().st_size for name in reader.manifest.files
        )
        self._done = sum(reader.header_of(name).data_start for name in sizes)

    def count(self, nbytes: int) -> None:
        self._done += nbytes
        if self._on_progress is not None:
            self._on_progress(self.name, self._done, self._total)


def _report(reader: PackedReader, shard_bytes: int, comparison: Comparison | None) -> VerifyReport:
    coverage = reader.manifest.coverage
    assert coverage is not None, "a manifest that was read has its coverage"
    return VerifyReport(
        path=str(reader.path),
        format_version=reader.format_version,
        shards=len(reader.shard_files()),
        shard_bytes=shard_bytes,
        files=len(reader.manifest.files),
        quantized=len(coverage.quantized),
        kept=len(coverage.kept),
        carried=len(coverage.carried),
        tuned=len(coverage.tuned),
        errors=None if comparison is None else comparison.errors(),
    )


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
    coverage = reader.manifest.coverage
    assert coverage is not None
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
    for name in sorted(set(found) - set(expected_shapes) - set(coverage.carried)):
        raise VerificationError(f"{name} has no place in the model that the configuration describes")


def _check_files(reader: PackedReader) -> None:
    stored = set(reader.shard_files())
    for name in sorted(stored ^ set(reader.manifest.shards)):
        where = "the manifest has no hash of it" if name in stored else "no tensor is in it"
        raise VerificationError(f"shard {name} is not accounted for: {where}")
    for name in sorted(path.name for path in reader.path.glob("*.safetensors")):
        if name not in stored:
            raise VerificationError(f"{name} lies in {reader.path}, but belongs to no index and no manifest")


def _check_shard(reader: PackedReader, name: str, sweep: Sweep, comparison: Comparison | None) -> None:
    """Hash a shard and look at its numbers on the way; a wrong hash comes first, for it explains the rest."""
    coverage = reader.manifest.coverage
    assert coverage is not None
    carried = set(coverage.carried)
    faults: list[str] = []

    def inspect(piece: Piece) -> None:
        if faults:
            return
        fault = None if piece.entry.name in carried else illegal_number(piece)
        if fault is None and comparison is not None:
            fault = comparison.inspect(piece)
        if fault is not None:
            faults.append(fault)

    units = {} if comparison is None else comparison.units()
    _compare_hashes(name, sweep.shard(name, units, inspect), reader.manifest.shards[name])
    if faults:
        raise VerificationError(faults[0])


def _compare_hashes(name: str, found: str, expected: str) -> None:
    if found != expected:
        raise VerificationError(f"{name} has sha256 {found[:16]}..., but the manifest says {expected[:16]}...")
