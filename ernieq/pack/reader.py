"""Reading a packed checkpoint: all that costs no data is checked at opening, arrays are views of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernieq.errors import FormatError
from ernieq.pack.header import RawTensor, ShardHeader, TensorEntry, read_shard_header
from ernieq.pack.json_file import read_json_object
from ernieq.pack.layout import (
    CONFIG_NAME,
    MANIFEST_NAME,
    PACKED_SUFFIX,
    PACKED_SUFFIXES,
    SCALE_SUFFIX,
    SIGNS_SUFFIX,
    ModuleSpec,
    unpack_signs,
)
from ernieq.pack.manifest import Manifest
from ernieq.pack.paths import check_file_name, check_tensor_name, locate
from ernieq.pack.quantization import is_ernieq_config, parse_quantization_config
from ernieq.pack.shards import INDEX_NAME, SINGLE_SHARD
from ernieq.trellis import TILE_SIDE, EncodedMatrix, TrellisCode

_SHARD = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
_MAX_SHARDS = 10_000


def is_packed(path: Path) -> bool:
    """Whether the directory's ``config.json`` says that it was packed by ernieq."""
    try:
        return is_ernieq_config(read_json_object(Path(path), CONFIG_NAME))
    except FormatError:
        return False


class PackedReader:
    """A packed checkpoint, opened read-only and memory-mapped.

    Opening reads the JSON files and the shards' headers and checks all that FORMAT.md says about them; the data
    is read when an array is used. ``verify_packed`` checks the data too.

    Args:
        path: the directory.

    Raises:
        FormatError: the directory breaks a MUST of FORMAT.md.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_json_object(self.path, CONFIG_NAME)
        what = str(self.path / CONFIG_NAME)
        self._modules = parse_quantization_config(self.config, what)
        self.manifest = Manifest.from_json(
            read_json_object(self.path, MANIFEST_NAME), str(self.path / MANIFEST_NAME)
        )
        if self.manifest.format_version != self.config["quantization_config"]["format_version"]:
            raise FormatError(f"{what} and {MANIFEST_NAME} have different format versions")
        self._headers = read_shard_headers(self.path)
        self._entries, self._file_of = _places(self._headers)
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._shapes = {module: self._check_module(module, spec) for module, spec in self._modules.items()}
        self._refuse_strays()

    @property
    def format_version(self) -> str:
        """Version of the packed format."""
        return self.manifest.format_version

    def modules(self) -> list[str]:
        """Names of the quantized matrices, sorted."""
        return sorted(self._modules)

    def tensors(self) -> list[str]:
        """Names of the tensors that are no packed matrix (kept, carried and tuned), sorted."""
        return sorted(name for name in self._entries if not name.endswith(PACKED_SUFFIXES))

    def spec_of(self, module: str) -> ModuleSpec:
        """Trellis code and rotation block of a quantized matrix.

        Raises:
            FormatError: there is no such module.
        """
        if module not in self._modules:
            raise FormatError(f"{self.path} has no quantized module {module}")
        return self._modules[module]

    def code_of(self, module: str) -> TrellisCode:
        """Trellis code of a quantized matrix."""
        return self.spec_of(module).code

    def shape_of(self, module: str) -> tuple[int, int]:
        """(out_features, in_features) of a quantized matrix, without reading its data."""
        self.spec_of(module)
        return self._shapes[module]

    def info(self, name: str) -> TensorEntry:
        """Type, shape and place of any stored tensor, by its full name.

        Raises:
            FormatError: there is no such tensor.
        """
        if name not in self._entries:
            raise FormatError(f"{self.path} has no tensor {name}")
        return self._entries[name]

    def file_of(self, name: str) -> str:
        """Name of the shard that holds a tensor."""
        self.info(name)
        return self._file_of[name]

    def shard_files(self) -> list[str]:
        """Names of the shards, sorted."""
        return sorted(set(self._file_of.values()))

    def header_of(self, file_name: str) -> ShardHeader:
        """What was read of a shard at opening."""
        return self._headers[file_name]

    def encoded(self, module: str) -> EncodedMatrix:
        """A quantized matrix; ``packed`` and ``scale`` are read-only views of the mapped file.

        Raises:
            FormatError: there is no such module, or a scale is zero, NaN or infinite.
        """
        spec = self.spec_of(module)
        scale = self._array(module + SCALE_SUFFIX, "<f2")
        if not np.isfinite(scale).all() or not scale.all():
            raise FormatError(f"{module}{SCALE_SUFFIX} holds a zero, NaN or infinite scale")
        return EncodedMatrix(
            packed=self._array(module + PACKED_SUFFIX, "<i2"),
            scale=scale,
            signs=unpack_signs(self._array(module + SIGNS_SUFFIX, "u1")),
            rotation_block=spec.rotation_block,
            code=spec.code,
        )

    def tensor(self, name: str) -> RawTensor:
        """A stored tensor; its data is a read-only view of the mapped file."""
        entry = self.info(name)
        data = self._bytes(entry).data if entry.nbytes else b""
        return RawTensor(entry.dtype, entry.shape, data)

    def release(self) -> None:
        """Let go of all mappings, so that pages already read no longer count as this process's memory.

        Arrays that are still in use keep theirs; the next read maps anew.
        """
        self._maps.clear()

    def _bytes(self, entry: TensorEntry) -> NDArray[np.uint8]:
        file_name = self._file_of[entry.name]
        if file_name not in self._maps:
            self._maps[file_name] = np.memmap(self.path / file_name, dtype=np.uint8, mode="r")
        return self._maps[file_name][entry.begin : entry.end]

    def _array(self, name: str, dtype: str) -> NDArray[Any]:
        entry = self.info(name)
        return self._bytes(entry).view(np.ndarray).view(dtype).reshape(entry.shape)

    def _check_module(self, module: str, spec: ModuleSpec) -> tuple[int, int]:
        packed = self._part(module + PACKED_SUFFIX, "I16", 3)
        row_tiles, column_tiles, units = packed.shape
        if units != spec.code.units_per_tile or not row_tiles or not column_tiles:
            raise FormatError(
                f"{packed.name} has shape {list(packed.shape)}; {spec.code.bits_per_weight} bits call for "
                f"[rows / 16, columns / 16, {spec.code.units_per_tile}]"
            )
        out_features, in_features = row_tiles * TILE_SIDE, column_tiles * TILE_SIDE
        for part, length in (
            (self._part(module + SCALE_SUFFIX, "F16", 1), out_features),
            (self._part(module + SIGNS_SUFFIX, "U8", 1), in_features // 8),
        ):
            if part.shape != (length,):
                raise FormatError(f"{part.name} has shape {list(part.shape)}; its matrix calls for [{length}]")
        if in_features % spec.rotation_block:
            raise FormatError(
                f"module {module} has rotation block {spec.rotation_block}, which does not divide {in_features}"
            )
        return out_features, in_features

    def _part(self, name: str, dtype: str, rank: int) -> TensorEntry:
        if name not in self._entries:
            raise FormatError(f"{name} is missing: {CONFIG_NAME} lists its module as quantized")
        entry = self._entries[name]
        if entry.dtype != dtype or len(entry.shape) != rank:
            raise FormatError(
                f"{name} is {entry.dtype} {list(entry.shape)}; expected {dtype} with {rank} dimensions"
            )
        if dtype != "U8" and entry.begin % 2:
            raise FormatError(
                f"{name} starts at the odd byte {entry.begin}; 16-bit tensors must start at an even one"
            )
        return entry

    def _refuse_strays(self) -> None:
        for name in self._entries:
            module, dot, last = name.rpartition(".")
            if f"{dot}{last}" in PACKED_SUFFIXES and module not in self._modules:
                raise FormatError(f"{name} belongs to no module that {CONFIG_NAME} lists as quantized")
            if f"{dot}{last}" == ".weight" and module in self._modules:
                raise FormatError(f"{name} is stored beside its own quantized form")


def read_shards(directory: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entry by tensor name, and shard file by tensor name; raises as ``read_shard_headers``."""
    return _places(read_shard_headers(directory))


def read_shard_headers(directory: Path) -> dict[str, ShardHeader]:
    """Headers of all shards of a checkpoint directory, packed or plain, by file name.

    Raises:
        FormatError: neither a shard nor an index is there, a header is illegal, or headers and index differ.
    """
    if not (directory / INDEX_NAME).exists():
        return {SINGLE_SHARD: read_shard_header(locate(directory, SINGLE_SHARD))}
    weight_map = read_json_object(directory, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{directory / INDEX_NAME} must have a non-empty object 'weight_map'")
    for name, file_name in weight_map.items():
        check_tensor_name(name, INDEX_NAME)
        if not _SHARD.fullmatch(check_file_name(file_name, INDEX_NAME)):
            raise FormatError(
                f"{INDEX_NAME} names the shard {file_name!a}; allowed is model-00001-of-00002.safetensors"
            )
    shards = sorted(set(weight_map.values()))
    if len(shards) > _MAX_SHARDS:
        raise FormatError(f"{INDEX_NAME} names {len(shards)} shards; allowed are {_MAX_SHARDS}")
    headers = {file_name: read_shard_header(locate(directory, file_name)) for file_name in shards}
    _check_index(weight_map, headers)
    return headers


def _check_index(weight_map: dict[str, str], headers: dict[str, ShardHeader]) -> None:
    found: set[str] = set()
    for file_name, header in headers.items():
        for entry in header.entries:
            if entry.name in found:
                raise FormatError(
                    f"{entry.name} is stored twice: in {weight_map[entry.name]} and in {file_name}"
                )
            if weight_map.get(entry.name) != file_name:
                raise FormatError(f"{entry.name} is stored in {file_name}, but {INDEX_NAME} says otherwise")
            found.add(entry.name)
    for name, file_name in weight_map.items():
        if name not in found:
            raise FormatError(f"{name} is not in {file_name}, where {INDEX_NAME} says it is")


def _places(headers: dict[str, ShardHeader]) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    pairs = [(file_name, entry) for file_name, header in headers.items() for entry in header.entries]
    return {entry.name: entry for _, entry in pairs}, {entry.name: file_name for file_name, entry in pairs}
