"""Which files of a directory hold the weights, and which belong beside them. Runs without torch."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ernieq.checkpoint.shard import Shard, check_tensor_name
from ernieq.errors import CheckpointError
from ernieq.untrusted import link_fault, read_json_object

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "ernieq.json"  # of a packed checkpoint; its home, ernieq/pack/layout.py, is a rung above

# Files that go with the weights into a converted checkpoint, as patterns of fnmatch; none lies in a folder.
AUX_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
)
# The index of a 300 B model has 6 MB; what is beyond this is no configuration and no index.
_MAX_JSON_BYTES = 1 << 25
# A plain name: no folder, nothing hidden, nothing that leaves the directory.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")


def aux_files(directory: Path) -> list[Path]:
    """Tokenizer, generation settings and chat template of a directory, by name.

    Raises:
        CheckpointError: one of them is a pipe or device, which would never end, or a link out of the directory,
            which would be copied into the output.
    """
    names = [path.name for path in directory.iterdir() if not path.is_dir()]
    wanted = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in AUX_PATTERNS))
    return [own_file(directory, name) for name in wanted]


def own_file(directory: Path, name: str) -> Path:
    """Path of a regular file of a checkpoint, which lies in its directory or in the hub's cache.

    Raises:
        CheckpointError: it is missing, no regular file, or a link to somewhere else.
    """
    if fault := link_fault(directory, name):
        raise CheckpointError(fault)
    return directory / name


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a checkpoint that holds one JSON object.

    Raises:
        CheckpointError: it is missing, leads elsewhere, is too large, or is not a strict JSON object.
    """
    return read_json_object(own_file(path.parent, path.name), _MAX_JSON_BYTES, CheckpointError)


def is_wint2_config(raw: dict[str, Any]) -> bool:
    """Whether a configuration says that FastDeploy's WINT2 was used."""
    quantization = raw.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quantization") == "wint2"


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name, from an index.

    Raises:
        CheckpointError: the index is malformed, or names a file that is not directly in its directory.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; an object from tensor to file name is needed")
    for tensor, file in weight_map.items():
        check_tensor_name(tensor, path)
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path} places {tensor[:100]!a} in {str(file)[:100]!a}; the plain name of a .safetensors file "
                "in the same directory is needed"
            )
    return weight_map


def open_shards(directory: Path) -> list[Shard]:
    """Open the one file or all shards of a directory and check that they agree with the index.

    Raises:
        CheckpointError: there are no weights, a shard is missing or malformed, or shards and index disagree.
    """
    if (directory / SINGLE_FILE).exists():  # transformers, too, takes it before an index
        return [Shard(own_file(directory, SINGLE_FILE))]
    index = directory / INDEX_FILE
    if not index.exists():
        raise CheckpointError(_no_weights(directory))
    weight_map = read_weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (directory / name).exists():
            tensor = next(tensor for tensor, file in weight_map.items() if file == name)
            raise CheckpointError(
                f"{index} places {tensor} in {name}, but there is no such file in {directory}"
            )
    shards = [Shard(own_file(directory, name)) for name in names]
    _check_agreement(weight_map, shards, index)
    return shards


def _check_agreement(weight_map: dict[str, str], shards: list[Shard], index: Path) -> None:
    holders: dict[str, str] = {}
    for shard in shards:
        for name in shard.entries:
            if name in holders:
                raise CheckpointError(
                    f"{name} is stored twice, in {holders[name]} and in {shard.path.name} of {index.parent}"
                )
            holders[name] = shard.path.name
    for name, file in weight_map.items():
        if holders.get(name) != file:
            where = f"it is in {holders[name]}" if name in holders else "no shard holds it"
            raise CheckpointError(f"{index} places {name} in {file}, but {where}")
    for name, file in holders.items():
        if name not in weight_map:
            raise CheckpointError(f"{index} does not list {name}, which {file} holds")


def _no_weights(directory: Path) -> str:
    other = sorted(
        path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pdparams", ".gguf"}
    )
    found = f"; it holds {other[0]}, which ernieq does not read" if other else ""
    if other and other[0].endswith(".pdparams"):
        found = f"; {other[0]} is a pickle, which could run code: have FastDeploy or Paddle write safetensors"
    return f"{directory} holds no weights: {SINGLE_FILE} or {INDEX_FILE} is needed{found}"
