"""What becomes of every tensor of the source, and the writing of those that are not quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from ernieq.checkpoint import Checkpoint
from ernieq.pack import Coverage, PackedWriter, RawTensor


def planned_coverage(checkpoint: Checkpoint, modules: Collection[str]) -> Coverage:
    """What must have become of every source tensor, from the source's own list of names.

    Args:
        checkpoint: the source.
        modules: what is quantized.
    """
    unknown = set(checkpoint.audit().unknown)
    quantized = {f"{module}.weight" for module in modules}
    names = checkpoint.names()
    return Coverage(
        tuple(name for name in names if name in quantized),
        tuple(name for name in names if name not in quantized and name not in unknown),
        tuple(name for name in names if name in unknown),
    )


def keep_rest(
    checkpoint: Checkpoint, planned: Coverage, writer: PackedWriter, tuned: Mapping[str, RawTensor]
) -> Coverage:
    """Write what is not quantized, as the source has it or as it was tuned.

    Args:
        checkpoint: the source.
        planned: what must become of its tensors.
        writer: takes the tensors.
        tuned: source name -> tensor that is written in place of the source's.

    Returns:
        What has become of the source's tensors.
    """
    carried = set(planned.carried)
    for name in sorted((*planned.kept, *carried)):
        if name in tuned:
            writer.add_tensor(name, tuned[name], tuned=True)
            continue
        info = checkpoint.info(name)
        raw = RawTensor(info.dtype, info.shape, checkpoint.read_bytes(name))
        writer.add_tensor(name, raw, carried=name in carried)
        del raw
        checkpoint.release()
    kept = tuple(name for name in planned.kept if name not in tuned)
    return dataclasses.replace(planned, kept=kept, tuned=tuple(sorted(tuned)))
