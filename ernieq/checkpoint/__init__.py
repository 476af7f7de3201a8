"""Checkpoint in: an ordinary Hugging Face directory or hub id, read lazily, one decoder layer at a time.

    hub.py          fetching from the hub                    checkpoint.py   tensors by name, the audit
    files.py        which files hold what                    modules.py      parts of the model, filled
    shard.py        one safetensors file                     tokenizer.py    the tokenizer
    json_object.py  JSON of strangers

The input is never written to.
"""

from __future__ import annotations

from ernieq.checkpoint.checkpoint import Checkpoint, SourceAudit, TensorInfo, open_checkpoint
from ernieq.checkpoint.modules import load_embedding, load_final_norm, load_head, load_layer
from ernieq.checkpoint.tokenizer import load_tokenizer

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
