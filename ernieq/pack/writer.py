"""Writing a packed checkpoint: tensors in as they come, an ordinary Hugging Face directory out, or nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ernieq.errors import FormatError, SourceChangedError
from ernieq.pack.atomic import AtomicDirectory, storage_errors
from ernieq.pack.header import RawTensor
from ernieq.pack.json_file import dump_json
from ernieq.pack.layout import (
    CARD_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PACKED_SUFFIX,
    PACKED_SUFFIXES,
    SCALE_SUFFIX,
    SIGNS_SUFFIX,
    ModuleSpec,
    check_rotation_block,
    little_endian_bytes,
    pack_signs,
)
from ernieq.pack.manifest import Coverage, Manifest
from ernieq.pack.paths import check_file_name, check_tensor_name
from ernieq.pack.quantization import quantization_config
from ernieq.pack.shards import DEFAULT_SHARD_BYTES, ShardWriter
from ernieq.pack.sweep import file_sha256
from ernieq.pack.verify import Progress, verify_packed
from ernieq.trellis import EncodedMatrix

_RESERVED = (CONFIG_NAME, MANIFEST_NAME, CARD_NAME)


class PackedWriter:
    """Context manager that streams a packed checkpoint to disk; nothing appears before ``finish``.

    Args:
        target: the directory to create.
        overwrite: whether a model directory that is there may be replaced (at the very end).
        shard_bytes: largest shard.
        staging: as of ``AtomicDirectory``.

    Raises:
        OutputExistsError: the target exists and may not be replaced.
        StorageError: the disk refuses.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool = False,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        staging: Path | None = None,
    ) -> None:
        self._directory = AtomicDirectory(target, overwrite=overwrite, staging=staging)
        self._shards = ShardWriter(self._directory.path, shard_bytes=shard_bytes)
        self._modules: dict[str, ModuleSpec] = {}
        self._kept: list[str] = []
        self._carried: list[str] = []
        self._tuned: list[str] = []
        self._files: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._directory.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shards.close()
        self._directory.__exit__(kind, error, trace)

    def add_encoded(self, module_name: str, matrix: EncodedMatrix) -> None:
        """Add a quantized matrix as the three ``weight_*`` tensors of its module.

        Args:
            module_name: name of the module, without ``.weight``.
            matrix: what the encoder found.

        Raises:
            FormatError: the name is taken or illegal, or a scale, sign or rotation block is illegal.
            StorageError: the disk refuses.
        """
        check_tensor_name(module_name, "the packed checkpoint")
        check_rotation_block(matrix.rotation_block, module_name)
        if not np.isfinite(matrix.scale).all() or not matrix.scale.all():
            raise FormatError(f"{module_name}{SCALE_SUFFIX} holds a zero, NaN or infinite scale")
        if not (np.abs(matrix.signs) == 1).all():
            raise FormatError(f"{module_name}{SIGNS_SUFFIX} holds a sign that is neither +1 nor -1")
        arrays = (
            (PACKED_SUFFIX, "I16", matrix.packed.astype(np.int16, copy=False)),
            (SCALE_SUFFIX, "F16", matrix.scale.astype(np.float16, copy=False)),
            (SIGNS_SUFFIX, "U8", pack_signs(matrix.signs)),
        )
        for suffix, dtype, array in arrays:
            data = little_endian_bytes(array)
            self._shards.add(f"{module_name}{suffix}", RawTensor(dtype, array.shape, data))
        self._modules[module_name] = ModuleSpec(matrix.code, matrix.rotation_block)

    def add_tensor(self, name: str, tensor: RawTensor, *, carried: bool = False, tuned: bool = False) -> None:
        """Add a tensor that is not a packed matrix.

        Args:
            name: its name in the source.
            tensor: its bytes.
            carried: True if the model does not know it (it is then listed as carried, not kept).
            tuned: True if its numbers are no longer those of the source (it is then listed as tuned).

        Raises:
            FormatError: the name is taken, illegal, or one of a packed matrix; the data does not fit the shape.
            StorageError: the disk refuses.
        """
        if name.endswith(PACKED_SUFFIXES):
            raise FormatError(f"{name} can't be kept unchanged: the name is that of a part of a packed matrix")
        self._shards.add(name, tensor)
        (self._tuned if tuned else self._carried if carried else self._kept).append(name)

    def copy_file(self, path: Path) -> None:
        """Copy a file (tokenizer, generation config) verbatim, under its own name.

        Raises:
            FormatError: the name is illegal or belongs to the checkpoint itself.
            SourceChangedError: the file can't be read.
            StorageError: it can't be written.
        """
        name = check_file_name(path.name, "the packed checkpoint")
        if name in _RESERVED or ".safetensors" in name or name in self._files:
            raise FormatError(f"{name} can't be copied: the packed checkpoint has its own file of that name")
        copy = self._directory.path / name
        try:
            source = path.open("rb")
        except OSError as error:
            raise SourceChangedError(f"{path} can't be read: {error.strerror}") from error
        with source, storage_errors(self._directory.target / name):
            with copy.open("wb") as target:
                shutil.copyfileobj(source, target)
            self._files[name] = file_sha256(copy)

    def finish(
        self,
        config: Mapping[str, Any],
        manifest: Manifest,
        *,
        card: str | None = None,
        on_progress: Progress | None = None,
        on_verified: Callable[[str], None] = lambda _: None,
    ) -> Path:
        """Write config, manifest and card, fsync, verify, and publish the directory.

        Args:
            config: the source's ``config.json``; ``quantization_config`` is added.
            manifest: the format version, shards, files, an empty ``created`` and an absent ``coverage`` are
                filled in.
            card: text of ``README.md``.
            on_progress: told how many bytes have been verified.
            on_verified: called with the sha256 of ``ernieq.json`` just before the directory is published.

        Returns:
            The target.

        Raises:
            FormatError: the config is already quantized, or no matrix was added.
            VerificationError: what was written does not hold together.
            StorageError: the disk refuses.
        """
        if "quantization_config" in config:
            raise FormatError("config.json of the source has a quantization_config: it is already quantized")
        if not self._modules:
            raise FormatError("a packed checkpoint without a quantized matrix can't be written")
        complete = replace(
            manifest,
            format_version=FORMAT_VERSION,
            shards=self._shards.finish(),
            files=self._files,
            created=manifest.created or datetime.now(UTC).isoformat(timespec="seconds"),
            coverage=manifest.coverage or self._coverage(),
        )
        texts = {
            CONFIG_NAME: dump_json({**config, "quantization_config": quantization_config(self._modules)}),
            MANIFEST_NAME: dump_json(complete.to_json()),
        }
        if card is not None:
            texts[CARD_NAME] = card.encode("utf-8")
        for name, text in texts.items():
            with storage_errors(self._directory.target / name):
                (self._directory.path / name).write_bytes(text)

        def check(path: Path) -> None:
            verify_packed(path, on_progress=on_progress)
            on_verified(hashlib.sha256(texts[MANIFEST_NAME]).hexdigest())

        return self._directory.commit(check)

    def _coverage(self) -> Coverage:
        quantized = tuple(f"{name}.weight" for name in self._modules)
        return Coverage(quantized, tuple(self._kept), tuple(self._carried), tuple(self._tuned))
