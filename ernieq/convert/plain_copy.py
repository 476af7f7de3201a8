"""Writing a checkpoint as an ordinary one, a tensor at a time: what an import is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ernieq.checkpoint import Checkpoint
from ernieq.convert.plain_output import check_written, plain_config, refuse_overlap, refuse_small_disk
from ernieq.pack import DEFAULT_SHARD_BYTES, AtomicDirectory, Progress, RawTensor, ShardWriter, storage_errors
from ernieq.pack.json_file import dump_json
from ernieq.pack.layout import CONFIG_NAME


@dataclass(frozen=True)
class CopyReport:
    """What was written: tensors, shards, and bytes of tensor data."""

    tensors: int
    shards: int
    nbytes: int


def write_plain(
    checkpoint: Checkpoint,
    out: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: Progress | None = None,
) -> CopyReport:
    """Write what a checkpoint stands for as an ordinary one, with its tokenizer.

    One tensor is in memory at a time, and the directory appears only when it is whole.

    Args:
        checkpoint: read tensor by tensor; its files are never touched.
        out: the directory to create.
        overwrite: whether a model directory that is there may be replaced.
        shard_bytes: largest shard.
        on_progress: called with a tensor name, tensors done and tensors in all.

    Raises:
        CheckpointError: a tensor can't be read.
        OutputExistsError: the output exists and may not be replaced, or overlaps the source.
        StorageError: too little disk, or the disk refuses.
    """
    report = on_progress or (lambda _name, _done, _total: None)
    names = checkpoint.names()
    nbytes = sum(checkpoint.info(name).nbytes for name in names)
    refuse_overlap(checkpoint.directory, out)
    directory = AtomicDirectory(out, overwrite=overwrite)
    refuse_small_disk(directory.target, nbytes, shard_bytes, "the checkpoint")
    with directory:
        shards = ShardWriter(directory.path, shard_bytes=shard_bytes)
        try:
            for done, name in enumerate(names):
                report(name, done, len(names))
                info = checkpoint.info(name)
                shards.add(name, RawTensor(info.dtype, info.shape, checkpoint.read_bytes(name)))
                checkpoint.release()
            hashes = shards.finish()
        finally:
            shards.close()
        with storage_errors(directory.path):
            (directory.path / CONFIG_NAME).write_bytes(dump_json(plain_config(checkpoint.raw_config)))
            for path in checkpoint.aux_files():
                shutil.copyfile(path, directory.path / path.name)
        directory.commit(lambda path: check_written(path, names, "the checkpoint"))
    report("done", len(names), len(names))
    return CopyReport(len(names), len(hashes), nbytes)
