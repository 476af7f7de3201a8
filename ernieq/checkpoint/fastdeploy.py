"""A WINT2 checkpoint of FastDeploy, seen as the ordinary one that it stands for.

Names, shapes and orientation are those of Hugging Face; a tensor is decoded when it is read, so memory holds
one, and everything that takes a `Checkpoint` takes this one. Decoded matrices are rounded to bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernieq.checkpoint.checkpoint import Checkpoint, TensorInfo
from ernieq.checkpoint.fastdeploy_layout import UNSLICED, FastDeployLayout, Storage, StoredTensor
from ernieq.checkpoint.files import CONFIG_FILE, is_wint2_config, read_json
from ernieq.checkpoint.hub import OnProgress, locate
from ernieq.checkpoint.input_order import InputOrder, told_by_channels
from ernieq.checkpoint.weight_only import decode_int4, decode_int8
from ernieq.checkpoint.wint2 import decode_wint2, natural_inputs
from ernieq.errors import CheckpointError, MissingTensorError
from ernieq.model import expected_parameters

# Layers and experts whose channels are compared when the order of inputs is to be told.
_COMPARED_LAYERS, _COMPARED_EXPERTS = 4, 4


class FastDeployCheckpoint(Checkpoint):
    """A directory with WINT2 weights, opened for reading; headers are checked, data is read when asked for.

    Args:
        directory: where the files are.
        source: what was asked for, a path or a hub id.
        revision: commit of a checkpoint of the hub.
        order: order of the inputs in the WINT2 matrices; None lets the weights tell.

    Raises:
        UnsupportedModelError: there is no WINT2 matrix, or a tensor has no place in the model.
        CheckpointError: a tensor is missing, has another shape or dtype, or the order can't be told.

    Attributes:
        order: of the inputs in the WINT2 matrices.
        left_out: tensors of the multi-token head, which the model does not compute with.
    """

    def __init__(
        self, directory: Path, source: str, revision: str | None = None, order: InputOrder | None = None
    ) -> None:
        _refuse_slices(directory)
        super().__init__(directory, source, revision, raw_config=_ordinary_config(directory))
        found = {name: super(FastDeployCheckpoint, self).info(name) for name in super().names()}
        layout = FastDeployLayout(expected_parameters(self.config), found, directory)
        self._tensors = layout.tensors
        self.left_out = layout.left_out
        self.order = order or self._told_order()

    def names(self) -> list[str]:
        """All tensors of the ordinary checkpoint, sorted."""
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor; ``dtype`` and ``nbytes`` are those of what is read."""
        stored = self._entry(name)
        original = super().info(stored.tensor)
        dtype = "BF16" if stored.is_quantized else original.dtype
        nbytes = torch.Size(stored.shape).numel() * (4 if dtype == "F32" else 2)
        return TensorInfo(name, dtype, stored.shape, original.file, nbytes)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor, decoded; see `Checkpoint.read`."""
        tensor = self._decoded(self._entry(name))
        return tensor if dtype is None else tensor.to(dtype)

    def copy(self, name: str) -> Tensor:
        """A tensor, decoded, in memory of its own."""
        return self.read(name).clone()

    def read_bytes(self, name: str) -> memoryview:
        """A tensor's bytes as an ordinary checkpoint holds them."""
        tensor = self.read(name).contiguous()
        units = tensor.view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16)
        return units.numpy().data.cast("B")

    def storage_counts(self) -> dict[Storage, int]:
        """How many tensors of the ordinary checkpoint come from each kind of storage."""
        kinds = [stored.storage for stored in self._tensors.values()]
        return {storage: kinds.count(storage) for storage in Storage if storage in kinds}

    def _entry(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingTensorError(f"{self.directory} has no tensor {name}") from None

    def _told_order(self) -> InputOrder:
        """The order of inputs that agrees with the norms before the experts."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for index in range(self.config.num_hidden_layers):
            experts = [
                self._tensors.get(f"model.layers.{index}.mlp.experts.{expert}.gate_proj.weight")
                for expert in range(_COMPARED_EXPERTS)
            ]
            gates = [gate for gate in experts if gate is not None and gate.storage is Storage.WINT2]
            if not gates or len(pairs) == _COMPARED_LAYERS:
                continue
            power = torch.stack([self._wint2(gate).square().mean(dim=0) for gate in gates]).sum(dim=0)
            norm = self.read(f"model.layers.{index}.post_attention_layernorm.weight", torch.float32)
            pairs.append((power, norm))
        self.release()
        return told_by_channels(pairs, str(self.directory))

    def _decoded(self, stored: StoredTensor) -> Tensor:
        match stored.storage:
            case Storage.SAME:
                whole = self._raw(stored.tensor)
                return whole[stored.rows] if len(stored.shape) == 1 else whole
            case Storage.TRANSPOSED:
                return self._raw(stored.tensor).T[stored.rows].contiguous()
            case Storage.WINT2:
                decoded = self._wint2(stored)
                if self.order is InputOrder.KERNEL:
                    decoded = decoded[:, natural_inputs(stored.shape[1])]
                return decoded.to(torch.bfloat16)
            case Storage.INT8 | Storage.INT4:
                decode = decode_int8 if stored.storage is Storage.INT8 else decode_int4
                whole = decode(self._raw(stored.tensor), self._raw(f"{stored.place.module}.weight_scale"))
                return whole[stored.rows].to(torch.bfloat16)

    def _wint2(self, stored: StoredTensor) -> Tensor:
        """Decode a WINT2 matrix, its inputs in the order that they are stored in."""
        module, rows = stored.place.module, stored.rows
        packed, local_scale = (self._raw(f"{module}.{part}") for part in ("quant_weight", "weight_scale"))
        scales = [self._raw(f"{module}.{part}")[rows] for part in ("super_scales", "code_scale", "code_zp")]
        try:
            return decode_wint2(
                packed.view(torch.uint8)[:, rows], local_scale.view(torch.uint8)[:, rows], *scales
            )
        except CheckpointError as error:
            raise CheckpointError(f"{module} in {self.directory}: {error}") from None

    def _raw(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return super().read(name)


def open_fastdeploy(
    source: str | Path,
    *,
    revision: str | None = None,
    order: InputOrder | None = None,
    on_progress: OnProgress | None = None,
) -> FastDeployCheckpoint:
    """Open a WINT2 checkpoint, a directory or a hub id; arguments and errors as `open_checkpoint`.

    Args:
        source: path of a directory, or ``organisation/name``.
        revision: branch, tag or commit on the hub.
        order: order of the inputs in the WINT2 matrices; None lets the weights tell.
        on_progress: called with what is being done, steps done and steps in all.
    """
    directory, commit = locate(source, revision=revision, on_progress=on_progress)
    return FastDeployCheckpoint(directory, str(source), commit, order)


def is_fastdeploy(directory: Path) -> bool:
    """Whether the directory's ``config.json`` speaks of WINT2."""
    path = directory / CONFIG_FILE
    return path.is_file() and is_wint2_config(read_json(path))


def _refuse_slices(directory: Path) -> None:
    """Say where the whole checkpoint is: one for several GPUs has its weights in ``rank0``, ``rank1``, ..."""
    whole = [*directory.glob("*.safetensors"), *directory.glob("*.pdparams")]
    if not whole or (directory / "rank0").is_dir():
        raise CheckpointError(
            f"{directory} holds no whole checkpoint (those cut into slices for several GPUs are not read); "
            f"take {UNSLICED}"
        )


def _ordinary_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of the checkpoint that it stands for."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} is no checkpoint: it holds no {CONFIG_FILE}")
    raw = read_json(path)
    ordinary = {key: value for key, value in raw.items() if key != "quantization_config"}
    ordinary.setdefault("architectures", ["Ernie4_5_MoeForCausalLM"])
    ordinary.setdefault("model_type", "ernie4_5_moe")
    return ordinary
