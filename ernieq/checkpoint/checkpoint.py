"""The checkpoint that is read: its configuration, and its tensors one at a time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernieq.checkpoint.files import CONFIG_FILE, aux_files, is_wint2_config, open_shards, read_json
from ernieq.checkpoint.hub import OnProgress, locate
from ernieq.checkpoint.shard import Shard, ShardEntry
from ernieq.errors import (
    CheckpointError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnsupportedModelError,
)
from ernieq.model import ModelConfig, ParameterSpec, expected_parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WEIGHT_DTYPES = ("BF16", "F16", "F32")
# A tensor under these names that the configuration does not call for would change what the model computes;
# anything else (``mtp_*``, a tied head that is stored all the same) has no part in it.
_COMPUTING_PREFIXES = ("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")
_HARMLESS_SUFFIXES = (".rotary_emb.inv_freq",)
# Share of letters that a name has in common with one that it is a misspelling of (difflib), and how many names
# are compared at most: a checkpoint with more strangers is another model.
_ALIKE, _MOST_COMPARED = 0.9, 1000


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor; ``dtype`` is the safetensors name (``BF16``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int


@dataclass(frozen=True)
class SourceAudit:
    """Tensor names, sorted: those the configuration calls for, and those that are only carried along."""

    present: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]


class Checkpoint:
    """A Hugging Face directory with an ERNIE 4.5 model, opened for reading.

    Attributes:
        directory: where the files are.
        source: what was asked for, a path or a hub id.
        revision: commit of a checkpoint of the hub; None for a directory.
        config: the model.
        raw_config: ``config.json`` as it is.
        on_parameter: shown the name and the stored values of every tensor that ``parameter`` has checked.
    """

    def __init__(
        self,
        directory: Path,
        source: str,
        revision: str | None = None,
        *,
        raw_config: dict[str, Any] | None = None,
    ) -> None:
        """Read configuration (unless it is given) and headers; see `open_checkpoint`."""
        self.directory = directory
        self.source = source
        self.revision = revision
        self.raw_config = _read_config(directory) if raw_config is None else raw_config
        self.config = ModelConfig.from_dict(self.raw_config)
        self.on_parameter: Callable[[str, Tensor], None] = lambda *_: None
        self._shards = open_shards(directory)
        self._places: dict[str, tuple[Shard, ShardEntry]] = {
            name: (shard, entry) for shard in self._shards for name, entry in shard.entries.items()
        }

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._places)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        shard, entry = self._place(name)
        return TensorInfo(name, entry.dtype, entry.shape, shard.path, entry.end - entry.begin)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor; pages are read from the file when they are touched.

        Args:
            name: its name.
            dtype: dtype to convert to. Without a conversion the result is a view of the read-only mapping:
                writing into it would crash the process, so clone it first.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        from ernieq.checkpoint.tensors import view_tensor  # names, shapes and bytes are read without torch

        tensor = view_tensor(*self._place(name))
        return tensor if dtype is None else tensor.to(dtype)

    def copy(self, name: str) -> Tensor:
        """A tensor as stored, in memory of its own.

        Raises:
            MissingTensorError: there is no such tensor.
            SourceChangedError: its file is gone, or no longer the one that was opened.
        """
        from ernieq.checkpoint.tensors import read_tensor

        return read_tensor(*self._place(name))

    def read_bytes(self, name: str) -> memoryview:
        """A tensor's bytes, little-endian and row-major, as a read-only view of the mapping."""
        shard, entry = self._place(name)
        return memoryview(shard.mapping())[entry.begin : entry.end]

    def parameter(self, name: str, spec: ParameterSpec, dtype: torch.dtype) -> Tensor:
        """A tensor of the model, checked, in memory of its own.

        Raises:
            MissingTensorError: there is no such tensor.
            ShapeError: its shape is not the one that the configuration calls for.
            CheckpointError: it is not stored as bf16, fp16 or fp32.
            NonFiniteError: it holds NaN or infinity.
        """
        self._check(name, spec)
        stored = self.copy(name)
        low, high = stored.aminmax()  # NaN wins both, so no temporary of the tensor's size is needed
        if not (low.isfinite() and high.isfinite()):
            bad = stored.numel() - int(stored.isfinite().sum())
            raise NonFiniteError(
                f"{name} in {self.info(name).file} has {bad} of {stored.numel()} values that are NaN or "
                "infinite; only finite weights are allowed"
            )
        self.on_parameter(name, stored)
        return stored.to(dtype)

    def audit(self) -> SourceAudit:
        """Compare names, shapes and dtypes with what the configuration calls for, without reading data.

        Returns:
            The names; ``missing`` is empty.

        Raises:
            MissingTensorError: tensors are missing.
            ShapeError: a tensor has another shape.
            UnsupportedModelError: a layer, the final norm, the embedding or the head has a tensor that ernieq's
                model has no use for, so that it would not compute what the checkpoint's author meant.
            CheckpointError: a tensor is not stored as bf16, fp16 or fp32.
        """
        expected = expected_parameters(self.config)
        stored = set(self.names())
        missing = [name for name in expected if name not in stored]
        if missing:
            extra = [name for name in self._places if name not in expected]
            raise MissingTensorError(
                f"{self.directory} lacks {len(missing)} of the {len(expected)} tensors that its config.json "
                f"calls for, the first is {missing[0]}{_misspelt(missing[0], extra)}"
            )
        for name, spec in expected.items():
            self._check(name, spec)
        unknown = sorted(name for name in stored if name not in expected)
        for name in unknown:
            if _would_compute(name, self.config):
                raise UnsupportedModelError(
                    f"{name} in {self.info(name).file} has no place in the model that config.json describes, "
                    "and leaving it out would change what the model computes"
                )
        return SourceAudit(tuple(sorted(expected)), (), tuple(unknown))

    def aux_files(self) -> list[Path]:
        """Tokenizer, generation settings and chat template, which go with the weights."""
        return aux_files(self.directory)

    def shard_files(self) -> list[Path]:
        """The files that hold weights."""
        return [shard.path for shard in self._shards]

    def check_unchanged(self) -> None:
        """Look whether all shards are still the files whose headers were read, by their size and date.

        Raises:
            SourceChangedError: one of them is not.
        """
        for shard in self._shards:
            shard.check_unchanged()

    def release(self) -> None:
        """Let go of all mappings, so that pages already read no longer count as this process's memory.

        Tensors and views that are still in use keep theirs; the next read maps anew.
        """
        for shard in self._shards:
            shard.release()

    def close(self) -> None:
        """Let go of everything; the same as ``release``, for no file stays open between reads."""
        self.release()

    def _place(self, name: str) -> tuple[Shard, ShardEntry]:
        try:
            return self._places[name]
        except KeyError:
            raise MissingTensorError(f"{self.directory} has no tensor {name}") from None

    def _check(self, name: str, spec: ParameterSpec) -> None:
        info = self.info(name)
        if info.shape != spec.shape:
            raise ShapeError(
                f"{name} in {info.file} has shape {info.shape}; config.json calls for {spec.shape}"
            )
        if info.dtype not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{name} in {info.file} is stored as {info.dtype}; "
                f"weights must be one of {', '.join(_WEIGHT_DTYPES)}"
            )


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, on_progress: OnProgress | None = None
) -> Checkpoint:
    """Open a local directory or, where there is none, a checkpoint of the Hugging Face hub.

    Configuration and all headers are read and checked; no weights are.

    Args:
        source: path of a directory, or ``organisation/name``.
        revision: branch, tag or commit on the hub.
        on_progress: called with what is being done, steps done and steps in all.

    Raises:
        UnsupportedModelError: the model is not ERNIE 4.5 for text, or it is quantized already.
        CheckpointError: it can't be found, fetched or read.
        UsageError: a revision was given for a local directory.
    """
    directory, commit = locate(source, revision=revision, on_progress=on_progress)
    return Checkpoint(directory, str(source), commit)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.exists():
        raise CheckpointError(f"{directory} is no checkpoint: it holds no {CONFIG_FILE}")
    raw = read_json(path)
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        needed = "a bf16, fp16 or fp32 checkpoint is needed"
        if is_wint2_config(raw):
            method, needed = "FastDeploy, wint2", "ernieq import-wint2 reads it"
        raise UnsupportedModelError(f"{directory} is quantized already (by {str(method)[:60]!a}); {needed}")
    return raw


def _misspelt(missing: str, extra: Iterable[str]) -> str:
    """Names the tensor that may be the missing one under a wrong name, if there is such a tensor."""
    alike = difflib.get_close_matches(missing, sorted(extra)[:_MOST_COMPARED], n=1, cutoff=_ALIKE)
    return f"; it holds {alike[0]}, which config.json does not call for" if alike else ""


def _would_compute(name: str, config: ModelConfig) -> bool:
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return False
    return name.startswith(_COMPUTING_PREFIXES) and not name.endswith(_HARMLESS_SUFFIXES)
