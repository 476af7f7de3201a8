"""The coverage audit: every tensor of the source is quantized, kept (or tuned) or carried, and exactly once.

Made twice: of the plan before anything long, and of what was done before it is published. That the listed
tensors are really stored, and stored so, is checked by ``pack/verify.py`` between the two.
"""

from __future__ import annotations

import dataclasses

from ernieq.checkpoint import Checkpoint
from ernieq.errors import VerificationError
from ernieq.pack import Coverage


def audited(checkpoint: Checkpoint, coverage: Coverage) -> Coverage:
    """The coverage itself, if it accounts for every tensor of the source once.

    Args:
        checkpoint: the source.
        coverage: what becomes, or has become, of its tensors.

    Raises:
        VerificationError: a tensor is missing, has two fates, or is not one of the source; it is named.
    """
    fates: dict[str, str] = {}
    for field in dataclasses.fields(coverage):
        for name in getattr(coverage, field.name):
            if name in fates:
                raise VerificationError(f"{name} would be both {fates[name]} and {field.name}")
            fates[name] = field.name
    names = set(checkpoint.names())
    for name in sorted(names - set(fates)):
        raise VerificationError(
            f"{name} of {checkpoint.directory} would be left out: it is neither quantized, kept nor carried"
        )
    for name in sorted(set(fates) - names):
        raise VerificationError(f"{name} would be {fates[name]}, but {checkpoint.directory} has no such tensor")
    return coverage


def coverage_sentence(coverage: Coverage) -> str:
    """How many tensors have which fate, and the first that the model does not know."""
    counts = {field.name: len(getattr(coverage, field.name)) for field in dataclasses.fields(coverage)}
    total = sum(counts.values())
    text = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
    named = f" (unknown to the model: {', '.join(coverage.carried[:3])}" if coverage.carried else ""
    more = ", ..." if len(coverage.carried) > 3 else ""
    return f"coverage: {total} source tensors, {text}, 0 missing{named}{more + ')' if named else ''}"
