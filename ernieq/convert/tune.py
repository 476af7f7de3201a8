"""After rounding: hold all encoded matrices of a model, tune what is continuous, hand over the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ernieq.checkpoint import Checkpoint
from ernieq.convert.distill import Distillation, TuningReport
from ernieq.convert.recipe import Recipe
from ernieq.convert.tunable import TunableModel
from ernieq.kernels.precision import float32_products
from ernieq.load import load_model
from ernieq.pack import RawTensor
from ernieq.trellis import EncodedMatrix

# Beyond this, two float32 copies of a model (8 GB) are no longer a small thing. A rule of sizes alone, so that
# bytes don't depend on the machine.
LARGEST_TUNED_MODEL = 1_000_000_000


class HeldMatrices:
    """A sink that holds what it is given, in order."""

    def __init__(self) -> None:
        self.matrices: dict[str, EncodedMatrix] = {}

    def add_encoded(self, module_name: str, matrix: EncodedMatrix) -> None:
        """Take one encoded matrix."""
        self.matrices[module_name] = matrix


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Args:
        matrices: module name -> matrix with the same code words, in the order in which they were encoded.
        tensors: source name -> tensors that are no longer the source's (norms), in its dtype.
        report: what tuning did; None if there was nothing to hold out.
    """

    matrices: Mapping[str, EncodedMatrix]
    tensors: Mapping[str, RawTensor]
    report: TuningReport | None


def tune_model(
    checkpoint: Checkpoint,
    matrices: Mapping[str, EncodedMatrix],
    windows: Tensor,
    recipe: Recipe,
    device: torch.device,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Tuned:
    """Tune row scales and norms of a quantized model by distillation; code words stay as they are.

    Args:
        checkpoint: the source.
        matrices: module name -> what the encoder found.
        windows: (windows, length) int64, calibration text.
        recipe: settings and seed.
        device: where both models lie, in float32.
        on_step: called with steps done and steps in all.
    """
    length = min(recipe.tune.window, windows.shape[1])
    windows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    if len(windows) < 2:
        return Tuned(matrices, {}, None)
    with float32_products(device, tensor_cores=True):
        student = TunableModel(checkpoint, matrices, device)
        teacher = load_model(checkpoint.directory, device=device)
        report = Distillation(teacher, student, windows, recipe.tune, recipe.seed).run(on_step)
    if not report.gained:
        return Tuned(matrices, {}, report)
    scaled = {
        name: dataclasses.replace(matrix, scale=student.scales[name].rounded())
        for name, matrix in matrices.items()
    }
    norms = {name: _raw(checkpoint.info(name).dtype, norm.rounded()) for name, norm in student.norms.items()}
    return Tuned(scaled, norms, report)


def _raw(dtype: str, tensor: Tensor) -> RawTensor:
    """The bytes of a tensor, little-endian."""
    units = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()
    return RawTensor(dtype, tuple(tensor.shape), units.astype(units.dtype.newbyteorder("<")).tobytes())
