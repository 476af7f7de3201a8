"""Checkpoint in: an ordinary Hugging Face directory or hub id, read lazily, one decoder layer at a time.

    hub.py          fetching from the hub                    checkpoint.py   tensors by name, the audit
    files.py        which files hold what                    modules.py      parts of the model, filled
    shard.py        one safetensors file                     tokenizer.py    the tokenizer
    tensors.py      its tensors as torch sees them

The input is never written to. Names, shapes and bytes are read without torch, which is imported with the first
tensor: ``ernieq verify --source`` runs where there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ernieq.checkpoint.checkpoint import Checkpoint, SourceAudit, TensorInfo, open_checkpoint
from ernieq.checkpoint.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ernieq.checkpoint.modules import load_embedding, load_final_norm, load_head, load_layer

__all__ = [
    "Checkpoint",
    "SourceAudit",
    "TensorInfo",
    "load_embedding",
    "load_final_norm",
    "load_head",
    "load_layer",
    "load_tokenizer",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import the loaders of modules, which bring torch in, when they are first asked for."""
    if name in __all__:
        from ernieq.checkpoint import modules

        return getattr(modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
