"""From a packed checkpoint back to an ordinary one, so that any other tool can check what the codes mean."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ernieq.convert.plain_output import check_written, plain_config, refuse_overlap, refuse_small_disk
from ernieq.kernels import matrix_rows
from ernieq.kernels.backend import Backend
from ernieq.pack import (
    DEFAULT_SHARD_BYTES,
    AtomicDirectory,
    PackedReader,
    Progress,
    ShardWriter,
    storage_errors,
)
from ernieq.pack.json_file import dump_json
from ernieq.pack.layout import CONFIG_NAME
from ernieq.pack.paths import locate
from ernieq.trellis import TILE_SIDE, EncodedMatrix

# Weights decoded at a time: 16 MB of float32, so that an embedding of any size streams through.
_CHUNK_WEIGHTS = 1 << 22
_BFLOAT16_BYTES = 2
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ExportReport:
    """What was written: matrices decoded, tensors copied unchanged, shards, and bytes of tensor data."""

    decoded: int
    unchanged: int
    shards: int
    nbytes: int


def decode_rows(
    matrix: EncodedMatrix, *, backend: Backend = Backend.AUTO, threads: int | None = None
) -> Iterator[torch.Tensor]:
    """Decode a matrix and turn it back into the basis of the source, some rows at a time.

    Args:
        matrix: (out_features, in_features), quantized.
        backend: the kernels' implementation.
        threads: of the kernels; all processors by default.

    Yields:
        (rows, in_features) float32, in order; together ``diag(scale) (values / 128) H diag(signs)``.
    """
    row_tiles = max(1, _CHUNK_WEIGHTS // (matrix.in_features * TILE_SIDE))
    for first in range(0, matrix.packed.shape[0], row_tiles):
        rows = slice(first * TILE_SIDE, (first + row_tiles) * TILE_SIDE)
        band = replace(matrix, packed=matrix.packed[first : first + row_tiles], scale=matrix.scale[rows])
        yield torch.from_numpy(matrix_rows.decode(band, backend=backend, threads=threads))


def export_bf16(
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    backend: Backend = Backend.AUTO,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> ExportReport:
    """Write the decoded weights of a packed checkpoint as an ordinary bf16 checkpoint.

    Quantized matrices are decoded, turned back and rounded to bfloat16; all other tensors and the tokenizer
    are copied unchanged; ``config.json`` loses its ``quantization_config``. A head that was stored beside the
    embedding that it is tied to is left out: it would win over the decoded one. One chunk of rows is in memory
    at a time, and the directory appears only when it is whole.

    Args:
        source: the packed checkpoint; never touched.
        out: the directory to create.
        overwrite: whether a model directory that is there may be replaced.
        shard_bytes: largest shard.
        backend: the kernels' implementation.
        threads: of the kernels; all processors by default.
        on_progress: called with a tensor name, tensors done and tensors in all.

    Raises:
        FormatError: the source is not a legal packed checkpoint.
        OutputExistsError: the output exists and may not be replaced, or overlaps the source.
        StorageError: too little disk, or the disk refuses.
    """
    reader = PackedReader(source)
    refuse_overlap(source, out)
    directory = AtomicDirectory(out, overwrite=overwrite)
    refuse_small_disk(directory.target, _exported_bytes(reader), shard_bytes, "the export")
    with directory:
        shards = ShardWriter(directory.path, shard_bytes=shard_bytes)
        try:
            _write_tensors(reader, shards, backend, threads, on_progress)
            hashes = shards.finish()
        finally:
            shards.close()
        _write_files(reader, directory.path)
        names = {*_copied(reader), *(f"{module}.weight" for module in reader.modules())}
        directory.commit(lambda path: check_written(path, names, "the exported checkpoint"))
    return ExportReport(len(reader.modules()), len(_copied(reader)), len(hashes), _exported_bytes(reader))


def _copied(reader: PackedReader) -> list[str]:
    """Names of the tensors that are copied unchanged."""
    tied = reader.config.get("tie_word_embeddings", True) is not False  # as transformers reads it
    return [name for name in reader.tensors() if not (tied and name == _HEAD)]


def _write_tensors(
    reader: PackedReader,
    shards: ShardWriter,
    backend: Backend,
    threads: int | None,
    on_progress: Progress | None,
) -> None:
    modules = {f"{module}.weight": module for module in reader.modules()}
    names = sorted([*modules, *_copied(reader)])
    for done, name in enumerate(names):
        if on_progress is not None:
            on_progress(name, done, len(names))
        if name not in modules:
            shards.add(name, reader.tensor(name))
            continue
        matrix = reader.encoded(modules[name])
        chunks = (_bf16_bytes(rows) for rows in decode_rows(matrix, backend=backend, threads=threads))
        shards.add_stream(name, "BF16", reader.shape_of(modules[name]), chunks)
    if on_progress is not None:
        on_progress("done", len(names), len(names))


def _bf16_bytes(rows: torch.Tensor) -> memoryview:
    """Rounded to the nearest bfloat16, ties to even; little-endian."""
    return rows.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2", copy=False).data


def _write_files(reader: PackedReader, target: Path) -> None:
    with storage_errors(target):
        (target / CONFIG_NAME).write_bytes(dump_json(plain_config(reader.config)))
        for name in reader.manifest.files:
            shutil.copyfile(locate(reader.path, name), target / name)


def _exported_bytes(reader: PackedReader) -> int:
    decoded = sum(_BFLOAT16_BYTES * rows * columns for rows, columns in map(reader.shape_of, reader.modules()))
    return decoded + sum(reader.info(name).nbytes for name in _copied(reader))
