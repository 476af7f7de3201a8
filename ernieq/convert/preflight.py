"""What must be there before a conversion begins its work: a place to write, disk, memory, every tensor's fate.

Everything here takes milliseconds. What can be known to fail is refused; what may fail is said.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ernieq.calibrate import Streams, stream_dtype
from ernieq.checkpoint import Checkpoint
from ernieq.convert.audit import audited
from ernieq.convert.output import SPARE_DISK_BYTES, check_place, directory_bytes
from ernieq.convert.plan import Plan, sample_tokens
from ernieq.convert.recipe import Recipe
from ernieq.convert.resources import available_memory, check_writable
from ernieq.convert.rest import planned_coverage
from ernieq.convert.staging import staging_path
from ernieq.convert.workplace import largest_layer
from ernieq.errors import BackendUnavailableError, StorageError
from ernieq.model import ModelConfig
from ernieq.pack import Coverage
from ernieq.records import format_bytes

_SNAPSHOTS = 2  # of both streams: the new one is whole before the old one goes
_LEAST_PROGRAM_BYTES = 250_000_000
_FLOAT32, _NARROW = 4, 2


def check_preflight(
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool,
    calibrated: bool = True,
    on_gpu: bool = False,
) -> list[str]:
    """Refuse a conversion that can't end well, before anything long.

    Args:
        checkpoint: the source.
        plan: what will be written.
        recipe: the sample.
        out: directory to create.
        overwrite: whether an existing model directory may be replaced.
        calibrated: whether a sample is run through the layers; stored Hessians spare its memory and disk.
        on_gpu: whether a GPU holds the layers.

    Returns:
        Sentences of what is tight.

    Raises:
        OutputExistsError: the output is the input or inside it, or exists and ``overwrite`` is false.
        StorageError: nothing can be written there, or the disk has too little space.
        BackendUnavailableError: there is certainly too little memory.
        VerificationError: a tensor of the source would be left out.
        CheckpointError: tensors are missing or have no place in the model.
    """
    check_place(checkpoint, out, overwrite=overwrite)
    audited_plan(checkpoint, plan)
    tokens = sample_tokens(checkpoint.config, recipe) if calibrated else 0
    check_disk(out, plan, staged_bytes(checkpoint.config, plan, tokens))
    return check_memory(plan, least_memory(checkpoint.config, tokens, on_gpu=on_gpu))


def audited_plan(checkpoint: Checkpoint, plan: Plan) -> Coverage:
    """What is to become of every tensor of the source.

    Raises:
        VerificationError: a tensor would be left out.
        CheckpointError: tensors are missing or have no place in the model.
    """
    return audited(checkpoint, planned_coverage(checkpoint, plan.modules))


def staged_bytes(config: ModelConfig, plan: Plan, tokens: int) -> int:
    """Disk that is taken while a conversion works: matrices that are done, and the state to resume from."""
    itemsize = stream_dtype(tokens, config.hidden_size).itemsize
    return plan.output_bytes + _SNAPSHOTS * 2 * tokens * config.hidden_size * itemsize


def check_disk(out: Path, plan: Plan, staged: int) -> None:
    """Refuse a place that can't be written, or can't hold the output and what is staged for it.

    All of it lies on one file system: the output is built beside where it will appear. What an earlier run has
    left there, and this one goes on from, counts.

    Args:
        out: directory to create.
        plan: tells the size of the output.
        staged: see ``staged_bytes``.

    Raises:
        StorageError: the sentence names the directory, and what is needed for what.
    """
    target = out.resolve()
    place = check_writable(target)
    needed = plan.output_bytes + staged + SPARE_DISK_BYTES
    needed -= directory_bytes(staging_path(target))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"{place} has {format_bytes(free)} free and the conversion needs {format_bytes(needed)}: "
            f"{format_bytes(plan.output_bytes)} for the output and up to {format_bytes(staged)} for what it is "
            "made and resumed from; free some, or name an --out on another disk"
        )


def least_memory(config: ModelConfig, tokens: int, *, on_gpu: bool) -> int:
    """Bytes of memory below which a conversion is impossible, however lucky."""
    layer = largest_layer(config)
    table = config.vocab_size * config.hidden_size
    if on_gpu:
        return _LEAST_PROGRAM_BYTES + _NARROW * layer
    streams = int(Streams.bytes_held(tokens, config.hidden_size))
    # The embedding comes before the streams' second halves, a layer beside all of them.
    return _LEAST_PROGRAM_BYTES + max(_FLOAT32 * layer + streams, 2 * _FLOAT32 * table)


def check_memory(plan: Plan, least: int) -> list[str]:
    """Refuse what can't fit into memory and swap; say what may not fit.

    Args:
        plan: tells the peak that is expected.
        least: bytes without which it is impossible.

    Raises:
        BackendUnavailableError: there is less than that.
    """
    memory = available_memory()
    if memory is None:
        return []
    found = format_bytes(memory.available)
    if memory.available + memory.swap < least:
        raise BackendUnavailableError(
            f"the conversion needs at least {format_bytes(least)} of memory and {found} is available; end "
            "other programs, raise the limit of the container, or pass fewer --windows"
        )
    if memory.available < plan.memory_bytes:
        return [
            f"memory is tight: {found} is available and about {format_bytes(plan.memory_bytes)} is needed; "
            "end other programs or pass fewer --windows if the system stops this one"
        ]
    return []
