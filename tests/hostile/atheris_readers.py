"""Fuzz the parsers guided by coverage: ``python -m tests.hostile.atheris_readers -max_total_time=600 CORPUS``.

Needs ``pip install atheris`` (Linux, and not every CPython), so it is no part of the development tools. The
first byte of an input chooses the parser. CORPUS is a folder that libFuzzer fills; it begins with valid files.
What it finds belongs into a test: ``bad_files.py`` or beside the parser. Torch is not needed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["ernieq"]):
    from ernieq.checkpoint.files import read_weight_map
    from ernieq.checkpoint.shard import Shard
    from ernieq.errors import ErnieqError, FormatError
    from ernieq.model.config import ModelConfig
    from ernieq.model.parameters import expected_parameters
    from ernieq.pack.header import read_shard_header
    from ernieq.pack.manifest import Manifest
    from ernieq.pack.paths import check_tensor_name
    from ernieq.pack.patterns import expand_names
    from ernieq.pack.quantization import parse_quantization_config
    from ernieq.untrusted import parse_json_object

from tests.pack.packed_factory import write_packed

PLACE = Path(tempfile.mkdtemp())


def parsed(raw: bytes) -> dict[str, Any]:
    return parse_json_object(raw, "a file", FormatError)


def on_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def parse(raw: bytes) -> object:
        (PLACE / "file").write_bytes(raw)
        return read(PLACE / "file")

    return parse


def shard(raw: bytes) -> None:
    """Both readers on a header, with as much data behind it as it asks for, up to a kilobyte."""
    for data in (0, 64, 1024):
        (PLACE / "file").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(data))
        for read in (read_shard_header, Shard):
            try:
                read(PLACE / "file")
            except ErnieqError:
                continue


PARSERS: tuple[Callable[[bytes], object], ...] = (
    shard,
    on_file(read_shard_header),
    on_file(Shard),
    on_file(read_weight_map),
    lambda raw: Manifest.from_json(parsed(raw), "a file"),
    lambda raw: parse_quantization_config(parsed(raw), "a file"),
    lambda raw: expected_parameters(ModelConfig.from_dict(parsed(raw))),
    lambda raw: expand_names(
        [check_tensor_name(name, "a file") for name in raw.decode("latin-1").split("\n")], "a"
    ),
)


def test_one_input(raw: bytes) -> None:
    """Whatever is not one of our errors ends the run."""
    try:
        PARSERS[raw[0] % len(PARSERS) if raw else 0](raw[1:])
    except ErnieqError as error:
        message = str(error)
    else:
        return
    if not message.isprintable():
        raise ValueError(f"a message that can't be printed: {message!r}")


def seeds(corpus: Path) -> None:
    """Valid inputs of every parser."""
    packed = write_packed(PLACE / "packed", shard_bytes=4000)
    whole = write_packed(PLACE / "whole")
    data = (whole / "model.safetensors").read_bytes()
    sizes = ("hidden_size", "num_attention_heads", "vocab_size", "intermediate_size", "num_hidden_layers")
    config = {"model_type": "ernie4_5", **dict.fromkeys(sizes, 4), "rope_parameters": {"rope_theta": 1e4}}
    valid = (
        data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(),
        data,
        data,
        (packed / "model.safetensors.index.json").read_bytes(),
        (whole / "ernieq.json").read_bytes(),
        (whole / "config.json").read_bytes(),
        json.dumps(config).encode(),
        b"model.layers.1-27.mlp.experts.0,3,5-9.gate_proj\nmodel.norm",
    )
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(valid):
        (corpus / f"valid-{number}").write_bytes(bytes([number]) + content)


if __name__ == "__main__":
    seeds(Path(sys.argv[-1]))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
