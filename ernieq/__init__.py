"""ernieq: ERNIE 4.5 language models at 1.5 to 6 bits per weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ernieq.integrations.transformers.hook import register_when_imported

if TYPE_CHECKING:
    from ernieq.load import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]

register_when_imported()  # so that transformers loads packed checkpoints; imports nothing of it yet


def __getattr__(name: str) -> Any:
    """Import torch only when a model is asked for, so that ``ernieq --help`` is quick."""
    if name == "load_model":
        from ernieq.load import load_model

        return load_model
    raise AttributeError(f"module 'ernieq' has no attribute {name!r}")
