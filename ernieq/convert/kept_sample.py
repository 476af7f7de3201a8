"""The calibration tokens of a job, kept beside its work: who goes on with it has the very same, and at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ernieq.calibrate import CalibrationSample
from ernieq.convert.staging import SAMPLE, Staging
from ernieq.convert.tensor_file import TensorFile, array_of, read_tensor_file, write_tensor_file
from ernieq.pack import RawTensor

_FILE = "sample.safetensors"


def sample_of_job(staging: Staging, draw: Callable[[], CalibrationSample]) -> CalibrationSample:
    """The sample of an earlier run of the job, or one that is drawn now and kept.

    Raises:
        StorageError: the disk refuses.
    """
    path = staging.folder("sample") / _FILE
    for event in staging.journal.events(SAMPLE)[-1:]:
        if (file := read_tensor_file(path, event["sha256"])) is not None:
            windows = torch.from_numpy(array_of(file.tensors["windows"], "<i8"))
            files = tuple((name, sha256) for name, sha256 in file.note["files"])
            return CalibrationSample(windows, files, file.note["seed"])
    sample = draw()
    raw = RawTensor("I64", tuple(sample.windows.shape), sample.windows.numpy().astype("<i8").tobytes())
    kept = TensorFile({"windows": raw}, {"files": sample.files, "seed": sample.seed})
    staging.journal.append(SAMPLE, sha256=write_tensor_file(path, kept.chunks()))
    return sample
