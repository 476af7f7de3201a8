"""A scan of the source: headers before anything long, and what its numbers are while they are read anyway.

Headers and sizes of all shards are checked when a checkpoint is opened (``checkpoint/shard.py``), and a NaN or
an infinity stops a conversion where it is read. Left to be told: rows of zeros. They are legal (unused tokens
have such rows), their scale is the smallest float16, and they decode to less than 3e-7; but a matrix full of
them may be a checkpoint that somebody has not finished.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ernieq.checkpoint import Checkpoint

_NAMED = 3  # tensors that a sentence names


@dataclass(frozen=True)
class ZeroRows:
    """Rows of a matrix that hold nothing but zeros, and how many it has in all."""

    name: str
    zero: int
    rows: int

    def __str__(self) -> str:
        """For a sentence."""
        return f"{self.name} ({'all' if self.zero == self.rows else f'{self.zero} of'} {self.rows})"


class SourceScan:
    """Looks at every weight of a checkpoint once, when something reads it.

    Args:
        checkpoint: is told to show what is read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._seen: set[str] = set()
        self._zero_rows: dict[str, ZeroRows] = {}
        checkpoint.on_parameter = self._look

    @property
    def zero_rows(self) -> list[ZeroRows]:
        """Matrices that have rows of zeros, by name."""
        return [self._zero_rows[name] for name in sorted(self._zero_rows)]

    def headers(self) -> str:
        """What is known before any weight is read."""
        files, names = self._checkpoint.shard_files(), self._checkpoint.names()
        plural = "" if len(files) == 1 else "s"
        return f"source: {len(files)} weight file{plural}, {len(names)} tensors, headers and sizes agree"

    def summary(self) -> str:
        """What was found in the weights that were read."""
        found = self.zero_rows
        parts = [f"source: {len(self._seen)} tensors read, all finite"]
        if found:
            total = sum(matrix.zero for matrix in found)
            named = ", ".join(str(matrix) for matrix in found[:_NAMED])
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            parts.append(f"{total} rows of zeros, in {named}{more}")
        else:
            parts.append("no row of zeros")
        return ", ".join(parts)

    def _look(self, name: str, stored: Tensor) -> None:
        if name in self._seen:
            return
        self._seen.add(name)
        if stored.dim() != 2 or not name.endswith(".weight"):
            return  # biases of zeros are nothing to tell
        rows = stored.shape[0]
        zero = rows - int(stored.any(dim=1).sum())
        if zero:
            self._zero_rows[name] = ZeroRows(name, zero, rows)
