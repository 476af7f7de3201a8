"""Checkpoint in: an ordinary Hugging Face directory or hub id, read lazily, one decoder layer at a time.

    hub.py          fetching from the hub                    checkpoint.py   tensors by name, the audit
    hub_errors.py   what the hub refuses, as a sentence      modules.py      parts of the model, filled
    files.py        which files hold what                    tokenizer.py    the tokenizer
    shard.py        one safetensors file                     json_object.py  JSON of strangers
    hub_headers.py  headers of the hub's files alone         hub_push.py     a packed checkpoint to the hub

Baidu's own 2-bit files (WINT2.md says what is known of them):

    fastdeploy.py   seen as the ordinary checkpoint          wint2.py        the 2-bit code
    fastdeploy_layout.py  what is stored where, and how      weight_only.py  int8 and int4 beside it
    paddle_names.py names and orientation                    input_order.py  in which order inputs are stored

The input is never written to.
"""

from __future__ import annotations

from ernieq.checkpoint.checkpoint import Checkpoint, SourceAudit, TensorInfo, open_checkpoint
from ernieq.checkpoint.fastdeploy import FastDeployCheckpoint, is_fastdeploy, open_fastdeploy
from ernieq.checkpoint.hub import locate
from ernieq.checkpoint.hub_headers import header_directory
from ernieq.checkpoint.input_order import InputOrder
from ernieq.checkpoint.modules import load_embedding, load_final_norm, load_head, load_layer
from ernieq.checkpoint.tokenizer import load_tokenizer

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
