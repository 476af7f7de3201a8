"""How long a conversion will take: short measurements on this machine, and the work that the plan holds."""

from __future__ import annotations

import hashlib
import time
from typing import NamedTuple

import torch

from ernieq.convert.plan import Plan
from ernieq.convert.recipe import Recipe
from ernieq.convert.speed import Speed
from ernieq.convert.tune import fits_in_float32
from ernieq.convert.tuning_speed import TuningSpeed
from ernieq.convert.workload import encoded_groups
from ernieq.convert.workplace import Workplace
from ernieq.encode import EncodeOptions
from ernieq.model import ModelConfig

_HASHED_BYTES = 8_000_000


class Estimate(NamedTuple):
    """Seconds of a conversion.

    Attributes:
        layers: of calibrating and encoding.
        rest: of what follows them: tuning, hashing.
    """

    layers: float
    rest: float

    @property
    def seconds(self) -> float:
        """All together."""
        return self.layers + self.rest


def estimate_time(
    config: ModelConfig,
    plan: Plan,
    recipe: Recipe,
    options: EncodeOptions,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - it can't be changed
    *,
    windows: int | None = None,
    tuned: bool = False,
    source_bytes: int = 0,
) -> Estimate:
    """The time that encoding, calibration, tuning and the hashing of files will take, from a probe of seconds.

    Reading and writing are left out: they cost little beside these, and how much is not to be known before.

    Args:
        config: of the model.
        plan: what is encoded.
        recipe: the sample, the code, the steps of tuning.
        options: how matrices are encoded.
        device: where.
        windows: of the sample, if they are not as many as the recipe calls for; 0 with stored Hessians.
        tuned: whether scales and norms are tuned.
        source_bytes: size of the source's files.
    """
    speed = Speed(config, recipe, options, device)
    groups = encoded_groups(config, plan.modules)
    seconds = sum(count * speed.encoding(shape) for shape, count in groups.items())
    length = min(recipe.calibration.window, config.max_position_embeddings)
    tokens = (recipe.calibration.windows if windows is None else windows) * length
    if tokens:
        seconds += speed.calibration(tokens, length)
    rest = (source_bytes + 2 * plan.output_bytes) * _hash_seconds()  # the output: written, and verified
    if tuned:
        narrow = not fits_in_float32(config, Workplace.on(device))
        rest += TuningSpeed(speed, config, recipe.tune, length, device, narrow=narrow).seconds(tokens)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is free decides how much the conversion takes
    return Estimate(seconds, rest)


def _hash_seconds() -> float:
    """Seconds a byte."""
    block = bytes(_HASHED_BYTES)
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    return (time.perf_counter() - started) / _HASHED_BYTES
