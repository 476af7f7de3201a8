"""One view of packed and ordinary checkpoints: encoded matrices, tensors, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ernieq.bundled import resolve_source
from ernieq.checkpoint import Checkpoint, is_fastdeploy, locate, open_checkpoint, open_fastdeploy
from ernieq.decode.weight import view_array
from ernieq.errors import FormatError, MissingTensorError, NonFiniteError, ShapeError
from ernieq.model import ModelConfig, ParameterSpec, expected_parameters
from ernieq.pack import PackedReader, RawTensor, is_packed
from ernieq.trellis import EncodedMatrix

_DECODER = "model.layers."
_WEIGHT = ".weight"
_PACKED_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_signs")
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class WeightSource(Protocol):
    """What loading needs of a checkpoint."""

    directory: Path
    config: ModelConfig
    base: str | None

    def is_quantized(self, module: str, /) -> bool:
        """Whether a module's weight is in the trellis code."""

    def encoded(self, module: str, /) -> EncodedMatrix:
        """The matrix of a quantized module, a view of the file."""

    def parameter(self, name: str, spec: ParameterSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor that is not quantized, checked, in memory of its own on the device.

        Raises:
            MissingTensorError: it is not there.
            ShapeError: its shape is not that of the spec.
            NonFiniteError: it holds NaN or infinity.
        """

    def release(self) -> None:
        """Let go of mappings that no tensor needs any more."""

    def tensor_bytes(self) -> dict[str, int]:
        """Stored bytes by source name; the parts of a quantized matrix count for its ``.weight``."""

    def file_bytes(self) -> int:
        """Size of all shards on disk."""

    def check_names(self) -> None:
        """Raise if a tensor is missing, or stored and neither used nor listed as carried."""


def open_source(path: str | Path) -> WeightSource:
    """Open a checkpoint, packed, ordinary or WINT2: a directory, ``bundled:NAME`` or a hub id.

    Raises:
        CheckpointError: there is no checkpoint.
        FormatError: a packed checkpoint breaks its format.
    """
    directory, _ = locate(resolve_source(path))
    if is_packed(directory):
        return PackedSource(directory)
    return PlainSource(open_fastdeploy(directory) if is_fastdeploy(directory) else open_checkpoint(directory))


class PackedSource:
    """A directory that ernieq packed."""

    def __init__(self, directory: Path) -> None:
        self._reader = PackedReader(directory)
        self.directory = directory
        self.config = ModelConfig.from_dict(self._reader.config)
        self.base: str | None = self._reader.manifest.source.name_or_path
        self._modules = frozenset(self._reader.modules())
        self._tensors = frozenset(self._reader.tensors())

    @property
    def reader(self) -> PackedReader:
        """The packed checkpoint itself, for those who need more than its weights."""
        return self._reader

    def is_quantized(self, module: str) -> bool:
        """Whether a module's weight is in the trellis code."""
        return module in self._modules

    def encoded(self, module: str) -> EncodedMatrix:
        """The matrix of a quantized module, a view of the file."""
        return self._reader.encoded(module)

    def parameter(self, name: str, spec: ParameterSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor that is not quantized, checked, in memory of its own on the device."""
        if name not in self._tensors:
            raise MissingTensorError(f"{name} is not in {self.directory}, neither quantized nor as it was")
        stored = _view_raw(name, self._reader.tensor(name))
        if tuple(stored.shape) != spec.shape:
            raise ShapeError(f"{name} has shape {tuple(stored.shape)}; config.json calls for {spec.shape}")
        if not torch.isfinite(stored).all():
            raise NonFiniteError(f"{name} in {self.directory} contains NaN or infinite numbers")
        # The stored bytes travel, which are half as many, and are converted where they arrive.
        return stored.to(dtype, copy=True) if device.type == "cpu" else stored.to(device).to(dtype)

    def release(self) -> None:
        """Do nothing: packed weights are used where they are mapped."""

    def tensor_bytes(self) -> dict[str, int]:
        """Stored bytes by source name."""
        sizes = {name: self._reader.info(name).nbytes for name in self._tensors}
        for module in self._modules:
            sizes[module + _WEIGHT] = sum(self._reader.info(module + part).nbytes for part in _PACKED_SUFFIXES)
        return sizes

    def file_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self.directory / name).stat().st_size for name in self._reader.shard_files())

    def check_names(self) -> None:
        """Raise if a tensor is missing, or stored and neither used nor listed as carried."""
        expected = expected_parameters(self.config)
        stored = self._tensors | {module + _WEIGHT for module in self._modules}
        for name in expected:
            if name not in stored:
                raise MissingTensorError(f"{name} is not in {self.directory}, neither quantized nor as it was")
        coverage = self._reader.manifest.coverage
        carried = frozenset(coverage.carried if coverage else ())
        unused = sorted(stored - carried - set(expected))
        if unused:
            raise FormatError(
                f"{unused[0]} is in {self.directory}, but the model has no such tensor and the manifest does "
                f"not list it as carried ({len(unused)} such tensors)"
            )


class PlainSource:
    """An ordinary checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.directory = checkpoint.directory
        self.config = checkpoint.config
        self.base: str | None = None

    def is_quantized(self, _module: str) -> bool:
        """False: nothing is."""
        return False

    def encoded(self, module: str) -> EncodedMatrix:
        """Never called: nothing is quantized."""
        raise AssertionError(f"{module} is not quantized")

    def parameter(self, name: str, spec: ParameterSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor, checked, in memory of its own on the device."""
        if device.type == "cpu":
            return self._checkpoint.parameter(name, spec, dtype)
        stored = _FLOATS.get(self._checkpoint.info(name).dtype, dtype)
        return self._checkpoint.parameter(name, spec, stored).to(device).to(dtype)

    def release(self) -> None:
        """Let go of the mappings: all that was read was copied."""
        self._checkpoint.release()

    def tensor_bytes(self) -> dict[str, int]:
        """Stored bytes by name."""
        return {name: self._checkpoint.info(name).nbytes for name in self._checkpoint.names()}

    def file_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(path.stat().st_size for path in self._checkpoint.shard_files())

    def check_names(self) -> None:
        """Raise if a tensor is missing or has a wrong shape; unknown ones are left aside."""
        self._checkpoint.audit()


def _view_raw(name: str, raw: RawTensor) -> Tensor:
    if raw.dtype not in _FLOATS:
        raise FormatError(f"{name} has dtype {raw.dtype}; the model takes {', '.join(_FLOATS)}")
    dtype = _FLOATS[raw.dtype]
    units = np.frombuffer(raw.data, dtype=np.int16 if dtype.itemsize == 2 else np.int32)
    return view_array(units).view(dtype).view(raw.shape)


def weight_bytes(source: WeightSource) -> dict[str, int]:
    """What the weights take: the answer to "how many bits are that really".

    Returns:
        ``total`` (shards on disk, headers and carried tensors included), ``decoder`` (tensors of the decoder
        layers), ``quantized`` (packed matrices with scales and signs), all in bytes; ``parameters`` of the
        model (a tied head counts once), and ``quantized_parameters`` of them.
    """
    sizes = source.tensor_bytes()
    shapes = {
        name: np.prod(spec.shape, dtype=np.int64) for name, spec in expected_parameters(source.config).items()
    }
    quantized = [name for name in shapes if source.is_quantized(name.removesuffix(_WEIGHT))]
    return {
        "total": source.file_bytes(),
        "decoder": sum(size for name, size in sizes.items() if name.startswith(_DECODER)),
        "quantized": sum(sizes[name] for name in quantized),
        "parameters": int(sum(shapes.values())),
        "quantized_parameters": int(sum(shapes[name] for name in quantized)),
    }
