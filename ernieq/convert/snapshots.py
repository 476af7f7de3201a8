"""Hidden states between two layers, saved so that a resumed run need not begin at the first layer."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from ernieq.calibrate import Streams
from ernieq.convert.journal import Journal
from ernieq.convert.tensor_file import TensorFile, read_tensor_file, write_tensor_file
from ernieq.pack import RawTensor

_SNAPSHOT = "snapshot"
# A snapshot is written when the last one is so many times as long ago as it took: 2.5 % of the time at most.
PATIENCE = 40
# Bytes of the first one for every second that has passed. The rate of a disk is not known before: at 500 MB/s,
# hashed and synced, it takes 5 % of the time until then.
_FIRST_BYTES_A_SECOND = 25e6

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_UNITS = {"F32": torch.float32, "BF16": torch.bfloat16}


class Snapshots:
    """The streams of one job, saved now and then in a folder; the last one alone is kept.

    Args:
        folder: where the files are; must exist.
        journal: says which one is whole.
        interrupted: whether the job was begun by an earlier run; it may be interrupted again, so the first one
            is written at once.
    """

    def __init__(self, folder: Path, journal: Journal, *, interrupted: bool) -> None:
        self._folder, self._journal, self._interrupted = folder, journal, interrupted
        self._began, self._next = time.monotonic(), 0.0

    def last(self, before: int) -> tuple[int, Streams] | None:
        """The last whole snapshot before that layer or an earlier one: which layer it is, and the streams."""
        for event in reversed(list(self._journal.events(_SNAPSHOT))):
            file = read_tensor_file(self._folder / event["file"], event["sha256"])
            if file is not None and event["layer"] <= before:
                return event["layer"], Streams(_tensor(file, "reference"), _tensor(file, "quantized"))
        return None

    def due(self, streams: Streams) -> bool:
        """Whether the last one is long enough ago, or the beginning."""
        if not self._next:
            size = streams.reference.nbytes + streams.quantized.nbytes
            return self._interrupted or time.monotonic() >= self._began + size / _FIRST_BYTES_A_SECOND
        return time.monotonic() >= self._next

    def save(self, layer: int, streams: Streams) -> None:
        """Save the streams before a layer; all units before it must have been journalled.

        Raises:
            StorageError: the disk refuses.
        """
        started = time.monotonic()
        streams.wait()
        raw = {"reference": _raw(streams.reference), "quantized": _raw(streams.quantized)}
        path = self._folder / f"streams-{layer:05d}.safetensors"
        digest = write_tensor_file(path, TensorFile(raw, {"layer": layer}).chunks())
        self._journal.append(_SNAPSHOT, layer=layer, file=path.name, sha256=digest)
        for older in self._folder.iterdir():
            if older != path:
                older.unlink()
        now = time.monotonic()
        self._next = now + PATIENCE * (now - started)


def _raw(stream: Tensor) -> RawTensor:
    units = stream.detach().cpu().contiguous().view(torch.uint8).numpy()
    return RawTensor(_DTYPES[stream.dtype], tuple(stream.shape), units.reshape(-1).data)


def _tensor(file: TensorFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    return torch.frombuffer(tensor.data, dtype=_UNITS[tensor.dtype]).reshape(tensor.shape)
