"""Where the base model of a packed checkpoint lies."""

from __future__ import annotations

from pathlib import Path

from ernieq.bundled import resolve_source


def resolve_base(recorded: str) -> Path | None:
    """Directory of the base that a manifest names, or None if it is not on this machine.

    Args:
        recorded: ``bundled:<name>``, a directory, or a hub id (which is never downloaded from here).

    Raises:
        UsageError: this installation does not carry the bundled model.
    """
    path = Path(resolve_source(recorded))
    return path if path.is_dir() else None
