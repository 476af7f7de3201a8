"""After rounding: hold all encoded matrices of a model, tune what is continuous, hand over the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ernieq.checkpoint import Checkpoint
from ernieq.convert.distill import Distillation, TuningReport
from ernieq.convert.groups import EMBEDDING, HEAD
from ernieq.convert.recipe import Recipe, TuneSettings
from ernieq.convert.teacher import Teacher
from ernieq.convert.tunable import TunableModel
from ernieq.convert.workplace import Workplace
from ernieq.kernels.precision import float32_products
from ernieq.model import ModelConfig, expected_parameters
from ernieq.pack import RawTensor
from ernieq.trellis import EncodedMatrix

# On a processor: a float32 model of this size takes 4 GB, and tuning it hours. A rule of sizes alone, so that
# bytes don't depend on the machine.
LARGEST_ON_CPU = 1_000_000_000
# Of a GPU's memory: activations held for a gradient, three tables of logits, the bf16 model's head.
_WORKING_BYTES = 8_000_000_000
_FLOAT32, _NARROW = 4, 2


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Args:
        matrices: module name -> matrix with the same code words, in the order in which they were encoded.
        tensors: source name -> tensors that are no longer the source's (norms and routers), in its dtype.
        report: what tuning did, unless there was none.
        untuned: why there was none.
    """

    matrices: Mapping[str, EncodedMatrix]
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)
    report: TuningReport | None = None
    untuned: str = ""


def refusal(parameters: int, workplace: Workplace) -> str | None:
    """Why a model of so many parameters can't be tuned there; None if it can."""
    size = f"the model has {parameters / 1e9:.1f} B parameters"
    if workplace.is_gpu and not _fits(_NARROW * parameters, workplace):
        needed = (_NARROW * parameters + _WORKING_BYTES) / 1e9
        return f"{size}, for which tuning needs {needed:.0f} GB of GPU memory"
    if not workplace.is_gpu and parameters > LARGEST_ON_CPU:
        return f"{size}; tuning on a CPU takes up to {LARGEST_ON_CPU / 1e9:.0f} B"
    return None


def tune_model(
    checkpoint: Checkpoint,
    matrices: Mapping[str, EncodedMatrix],
    windows: Tensor,
    recipe: Recipe,
    workplace: Workplace,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Tuned:
    """Tune row scales, norms and routers of a quantized model by distillation; code words stay as they are.

    On a CPU in float32; on a GPU in bfloat16 where float32 would not fit.

    Args:
        checkpoint: the source.
        matrices: module name -> what the encoder found.
        windows: (windows, length) int64, calibration text.
        recipe: settings and seed.
        workplace: the device that holds the quantized model, and its memory.
        on_step: called with steps done and steps in all.
    """
    length = min(recipe.tune.window, windows.shape[1])
    windows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    if len(windows) < 2:
        return Tuned(matrices, untuned="the calibration text is too short to hold some of it out")
    device, narrow = workplace.device, not fits_in_float32(checkpoint.config, workplace)
    try:
        with float32_products(device, tensor_cores=True):
            teacher = Teacher(checkpoint, windows, workplace)
            student = TunableModel(checkpoint, matrices, device, routers=recipe.tune.routers, narrow=narrow)
            settings = dataclasses.replace(recipe.tune, learning_rate=_step_size(recipe.tune, matrices))
            report = Distillation(teacher, student, windows, settings, recipe.seed).run(on_step)
    except torch.OutOfMemoryError:  # hours of encoding are not thrown away for it
        return Tuned(matrices, untuned="the GPU's memory ran out")
    if not report.gained:
        return Tuned(matrices, report=report)
    scaled = {
        name: dataclasses.replace(matrix, scale=student.scales.rounded(name))
        for name, matrix in matrices.items()
    }
    weights = {
        name: _raw(checkpoint.info(name).dtype, weight.rounded()) for name, weight in student.weights.items()
    }
    return Tuned(scaled, weights, report)


def _step_size(settings: TuneSettings, matrices: Mapping[str, EncodedMatrix]) -> float:
    """The step size for the mean rate of a decoder: a tenth for two bits more, as errors are smaller there."""
    decoder = [matrix for name, matrix in matrices.items() if name not in (EMBEDDING, HEAD)]
    weights = [matrix.packed.size / matrix.code.bits_per_weight for matrix in decoder]
    bits = sum(matrix.packed.size for matrix in decoder) / sum(weights) if decoder else 2.0
    return settings.learning_rate * 10 ** ((2 - bits) / 2)


def fits_in_float32(config: ModelConfig, workplace: Workplace) -> bool:
    """Whether a model can be tuned there in float32; else it is held in bfloat16."""
    parameters = sum(prod(spec.shape) for spec in expected_parameters(config).values())
    return _fits(_FLOAT32 * parameters, workplace)


def _fits(model_bytes: int, workplace: Workplace) -> bool:
    return workplace.vram_bytes is None or model_bytes + _WORKING_BYTES <= workplace.vram_bytes


def _raw(dtype: str, tensor: Tensor) -> RawTensor:
    """The bytes of a tensor, little-endian."""
    units = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()
    return RawTensor(dtype, tuple(tensor.shape), units.astype(units.dtype.newbyteorder("<")).tobytes())
