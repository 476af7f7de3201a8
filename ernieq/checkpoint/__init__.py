"""Checkpoint in: an ordinary Hugging Face directory or hub id, read lazily, one decoder layer at a time.

    hub.py          fetching from the hub                    checkpoint.py   tensors by name, the audit
    hub_errors.py   what the hub refuses, as a sentence      modules.py      parts of the model, filled
    files.py        which files hold what                    tokenizer.py    the tokenizer
    shard.py        one safetensors file                     tensors.py      its tensors as torch sees them
    hub_headers.py  headers of the hub's files alone         hub_push.py     a packed checkpoint to the hub

Baidu's own 2-bit files (WINT2.md says what is known of them):

    fastdeploy.py   seen as the ordinary checkpoint          wint2.py        the 2-bit code
    fastdeploy_layout.py  what is stored where, and how      weight_only.py  int8 and int4 beside it
    paddle_names.py names and orientation                    input_order.py  in which order inputs are stored

The input is never written to. Names, shapes and bytes are read without torch, which is imported with the first
tensor: ``ernieq verify --source`` runs where there is none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ernieq.checkpoint.checkpoint import Checkpoint, SourceAudit, TensorInfo, open_checkpoint
from ernieq.checkpoint.hub import locate
from ernieq.checkpoint.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ernieq.checkpoint.fastdeploy import FastDeployCheckpoint, is_fastdeploy, open_fastdeploy
    from ernieq.checkpoint.hub_headers import header_directory
    from ernieq.checkpoint.input_order import InputOrder
    from ernieq.checkpoint.modules import load_embedding, load_final_norm, load_head, load_layer

__all__ = [
    "Checkpoint",
    "FastDeployCheckpoint",
    "InputOrder",
    "SourceAudit",
    "TensorInfo",
    "header_directory",
    "is_fastdeploy",
    "load_embedding",
    "load_final_norm",
    "load_head",
    "load_layer",
    "load_tokenizer",
    "locate",
    "open_checkpoint",
    "open_fastdeploy",
]


_MODULE_OF = {
    "FastDeployCheckpoint": "fastdeploy",
    "InputOrder": "input_order",
    "header_directory": "hub_headers",
    "is_fastdeploy": "fastdeploy",
    "load_embedding": "modules",
    "load_final_norm": "modules",
    "load_head": "modules",
    "load_layer": "modules",
    "open_fastdeploy": "fastdeploy",
}


def __getattr__(name: str) -> Any:
    """Import what brings torch or the hub's library in when it is first asked for."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"ernieq.checkpoint.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
