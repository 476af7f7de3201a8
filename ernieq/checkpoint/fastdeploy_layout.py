"""Where a FastDeploy checkpoint holds each tensor of the ordinary one, and how: decided from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ernieq.checkpoint.checkpoint import TensorInfo
from ernieq.checkpoint.paddle_names import PaddlePlace, paddle_places, paddle_prefix
from ernieq.checkpoint.weight_only import INT4_ROWS, INT8_ROWS
from ernieq.checkpoint.wint2 import GROUP, GROUPS_PER_BYTE, WEIGHTS_PER_BYTE
from ernieq.errors import CheckpointError, MissingTensorError, ShapeError, UnsupportedModelError
from ernieq.model import ParameterSpec

UNSLICED = "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"
_BYTE_DTYPES, _FLOAT_DTYPES = ("U8", "I8"), ("BF16", "F16", "F32")
_QUANTIZED_PARTS = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
_MULTI_TOKEN = "mtp"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Storage(StrEnum):
    """How a tensor is stored."""

    WINT2 = "2 bits (WINT2)"
    INT4 = "int4"
    INT8 = "int8"
    TRANSPOSED = "as it is, (in, out)"
    SAME = "as it is"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the ordinary checkpoint: how and where it is stored, and its shape there."""

    storage: Storage
    place: PaddlePlace
    shape: tuple[int, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether it has to be decoded."""
        return self.storage not in (Storage.SAME, Storage.TRANSPOSED)

    @property
    def tensor(self) -> str:
        """The stored tensor that holds its numbers."""
        return f"{self.place.module}.{'quant_weight' if self.is_quantized else self.place.leaf}"

    @property
    def rows(self) -> slice:
        """Its output channels in the stored module."""
        return slice(self.place.first, self.place.first + self.place.rows)


class FastDeployLayout:
    """All tensors of the ordinary checkpoint by name.

    Args:
        specs: the model's tensors.
        found: what the headers say, by Paddle's names.
        directory: for errors.

    Raises:
        MissingTensorError, ShapeError, CheckpointError: a tensor is missing, or has another shape or dtype.
        UnsupportedModelError: there is no WINT2 matrix, or a tensor has no place in the model.

    Attributes:
        tensors: how each is stored.
        left_out: tensors of the multi-token head, which the model does not compute with.
    """

    def __init__(
        self, specs: Mapping[str, ParameterSpec], found: Mapping[str, TensorInfo], directory: Path
    ) -> None:
        self._specs, self._found, self._directory = specs, found, directory
        if not any(name.endswith(".code_scale") for name in found):
            raise UnsupportedModelError(
                f"{directory} holds no WINT2 matrix (one with a code_scale); "
                "ernieq quantize reads ordinary checkpoints"
            )
        prefix = paddle_prefix(found)
        self.tensors = {name: self._find(name, spec, prefix) for name, spec in specs.items()}
        self.left_out = self._unused()

    def _find(self, name: str, spec: ParameterSpec, prefix: str) -> StoredTensor:
        """Where and how a tensor of the model is stored, its shapes checked."""
        places = paddle_places(name, self._specs, prefix)
        for place in places:
            if place.leaf == "weight" and f"{place.module}.quant_weight" in self._found:
                return StoredTensor(self._quantized(place, spec), place, spec.shape)
            if f"{place.module}.{place.leaf}" in self._found:
                return StoredTensor(self._unquantized(name, place, spec), place, spec.shape)
        looked = " or ".join(f"{place.module}.{place.leaf}" for place in places)
        raise MissingTensorError(f"{self._directory} lacks {looked}, which its config.json calls for")

    def _quantized(self, place: PaddlePlace, spec: ParameterSpec) -> Storage:
        width, rows, module = spec.shape[1], place.all_rows, place.module
        if f"{module}.code_scale" in self._found:
            both = GROUP * GROUPS_PER_BYTE
            if width % both:
                raise ShapeError(f"{module} has {width} inputs; WINT2 needs a multiple of {both}")
            self._expect(module, "quant_weight", (width // WEIGHTS_PER_BYTE, rows), _BYTE_DTYPES)
            self._expect(module, "weight_scale", (width // both, rows), _BYTE_DTYPES)
            for part in ("super_scales", "code_scale", "code_zp"):
                self._expect(module, part, (rows,), _FLOAT_DTYPES)
            return Storage.WINT2
        half = self._found[f"{module}.quant_weight"].shape == (rows // 2, width)
        step = INT4_ROWS if half else INT8_ROWS
        if width % GROUP or rows % step:
            raise ShapeError(f"{module} is {rows} x {width}; multiples of {step} and {GROUP} are needed")
        self._expect(module, "quant_weight", (rows // 2 if half else rows, width), _BYTE_DTYPES)
        self._expect(module, "weight_scale", (rows,), _FLOAT_DTYPES)
        return Storage.INT4 if half else Storage.INT8

    def _unquantized(self, name: str, place: PaddlePlace, spec: ParameterSpec) -> Storage:
        stored = f"{place.module}.{place.leaf}"
        if len(spec.shape) == 1:
            self._expect(place.module, place.leaf, (place.all_rows,), _FLOAT_DTYPES)
            return Storage.SAME
        # FastDeploy takes a head in either orientation; a linear layer of the decoder is always (in, out).
        either_way = name == _HEAD and self._found[stored].shape == spec.shape
        if place.leaf != "weight" or name == _EMBEDDING or either_way:
            self._expect(place.module, place.leaf, spec.shape, _FLOAT_DTYPES)
            return Storage.SAME
        self._expect(place.module, place.leaf, (spec.shape[1], place.all_rows), _FLOAT_DTYPES)
        return Storage.TRANSPOSED

    def _expect(self, module: str, part: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        name = f"{module}.{part}"
        if name not in self._found:
            raise MissingTensorError(f"{self._directory} lacks {name}, which belongs to {module}")
        found = self._found[name]
        if found.shape != shape:
            raise ShapeError(
                f"{name} in {found.file} has shape {found.shape}; {shape} is needed "
                f"(in place of a checkpoint cut into slices, -TP2- or -TP4-, take the whole one, {UNSLICED})"
            )
        if found.dtype not in dtypes:
            raise CheckpointError(f"{name} in {found.file} is {found.dtype}; {' or '.join(dtypes)} is needed")

    def _unused(self) -> tuple[str, ...]:
        """Tensors that no parameter comes from: those of the multi-token head; any other is refused."""
        used = {_HEAD}  # may be stored beside a tied embedding
        for stored in self.tensors.values():
            module, leaf = stored.place.module, stored.place.leaf
            used.update(f"{module}.{part}" for part in (*_QUANTIZED_PARTS, leaf))
        unused = sorted(set(self._found) - used)
        for name in unused:
            if _MULTI_TOKEN not in name:
                raise UnsupportedModelError(
                    f"{name} in {self._found[name].file} has no place in the model that config.json describes; "
                    "FastDeploy checkpoints with WINT2, int4 and int8 weights are read, no others"
                )
        return tuple(unused)
