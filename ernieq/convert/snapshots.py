"""Hidden states within the model, saved so that a resumed run need not begin at the first layer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ernieq.calibrate import Streams
from ernieq.convert.journal import Journal
from ernieq.convert.overlap import BackgroundQueue
from ernieq.convert.tensor_file import TensorFile, read_tensor_file, write_large_file
from ernieq.pack import RawTensor

_SNAPSHOT = "snapshot"
# A snapshot is written when so many times as long has passed as those before it took: 2.5 %, and one more.
PATIENCE = 40
# Bytes of the first one for every second that has passed. The rate of a disk is not known before: at 500 MB/s,
# hashed and synced, it takes 5 % of the time until then.
_FIRST_BYTES_A_SECOND = 25e6

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_UNITS = {"F32": torch.float32, "BF16": torch.bfloat16}


class Mark(NamedTuple):
    """How far streams have got; of two marks the greater one is further on.

    Attributes:
        layer: number of the layer that they are before.
        attended: they are behind the attention of that layer, and before its feed-forward part.
    """

    layer: int
    attended: bool = False


class Snapshots:
    """The streams of one job, saved now and then in a folder; the last one alone is kept.

    Args:
        folder: where the files are; must exist.
        journal: says which one is whole.
        queue: hashes beside the writing.
        interrupted: whether the job was begun by an earlier run; it may be interrupted again, so the first one
            is written at once, and not counted.
    """

    def __init__(self, folder: Path, journal: Journal, queue: BackgroundQueue, *, interrupted: bool) -> None:
        self._folder, self._journal, self._queue, self._interrupted = folder, journal, queue, interrupted
        self._began, self._spent = time.monotonic(), 0.0

    def last(self, limit: Mark) -> tuple[Mark, Streams] | None:
        """The last whole snapshot that is no further on than ``limit``: its mark, and the streams."""
        for event in reversed(self._journal.events(_SNAPSHOT)):
            mark = Mark(event["layer"], event["attended"])
            file = read_tensor_file(self._folder / event["file"], event["sha256"]) if mark <= limit else None
            if file is not None:
                return mark, Streams(_tensor(file, "reference"), _tensor(file, "quantized"))
        return None

    def due(self, streams: Streams) -> bool:
        """Whether the time that snapshots have taken is little by now."""
        if self._interrupted:
            return True
        passed = time.monotonic() - self._began
        if self._spent:
            return passed >= PATIENCE * self._spent
        return passed >= (streams.reference.nbytes + streams.quantized.nbytes) / _FIRST_BYTES_A_SECOND

    def save(self, mark: Mark, streams: Streams) -> None:
        """Save the streams; all units that have gone into them must have been journalled.

        It is not read again: a damaged one costs time, and no work.

        Raises:
            StorageError: the disk refuses.
        """
        started = time.monotonic()
        streams.wait()
        raw = {"reference": _raw(streams.reference), "quantized": _raw(streams.quantized)}
        path = self._folder / f"streams-{mark.layer:05d}{'-attended' if mark.attended else ''}.safetensors"
        digest = write_large_file(path, TensorFile(raw, mark._asdict()).chunks(), self._queue)
        self._journal.append(_SNAPSHOT, **mark._asdict(), file=path.name, sha256=digest)
        for older in self._folder.iterdir():
            if older != path:
                older.unlink()
        self._spent += 0.0 if self._interrupted else time.monotonic() - started
        self._interrupted = False


def _raw(stream: Tensor) -> RawTensor:
    units = stream.detach().cpu().contiguous().view(torch.uint8).numpy()
    return RawTensor(_DTYPES[stream.dtype], tuple(stream.shape), units.reshape(-1).data)


def _tensor(file: TensorFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    return torch.frombuffer(tensor.data, dtype=_UNITS[tensor.dtype]).reshape(tensor.shape)
