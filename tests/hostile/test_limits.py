"""The largest inputs that are allowed are read within their time, and configurations can't ask for more."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.checkpoint.shard import Shard
from ernieq.errors import CheckpointError, FormatError
from ernieq.model import ModelConfig, expected_parameters
from ernieq.pack import read_header
from ernieq.pack.patterns import MAX_NAMES, expand_names
from ernieq.untrusted import parse_json_object, paused_collector
from tests.hostile.refusal import refusal
from tests.tiny import TinyOptions, tiny_config

MOST_SECONDS = (
    10.0  # of processor time, for what is read and not refused: reading that is quadratic takes minutes
)
MOST_JSON_BYTES = 200_000_000  # for 16 MiB of it
MOST_TENSOR_BYTES = 1600  # of memory for each tensor of a header, while it is read
READERS = pytest.mark.parametrize(
    "read", [read_header, lambda path: Shard(path).entries], ids=["packed", "source"]
)


def write_tensors(path: Path, count: int) -> Path:
    """A legal shard of many tensors of two bytes."""
    header = {
        f"model.layers.{number // 1000}.mlp.experts.{number % 1000}.weight": {
            "dtype": "BF16",
            "shape": [1, 1],
            "data_offsets": [2 * number, 2 * number + 2],
        }
        for number in range(count)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2 * count))
    return path


@READERS
def test_a_hundred_thousand_tensors_are_read_quickly(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = write_tensors(tmp_path / "model.safetensors", 100_000)
    started = time.process_time()
    assert len(read(path)) == 100_000
    assert time.process_time() - started < MOST_SECONDS


@READERS
def test_the_memory_for_a_header_is_bounded_by_its_tensors(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    path = write_tensors(tmp_path / "model.safetensors", 5000)
    tracemalloc.start()
    read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5000 * MOST_TENSOR_BYTES


def test_as_many_names_as_are_allowed_are_expanded_quickly() -> None:
    started = time.process_time()
    assert len(expand_names(["model.layers.0-127.mlp.experts.0-1023.up_proj"], "a file")) == MAX_NAMES
    assert time.process_time() - started < MOST_SECONDS
    refusal(lambda: expand_names(["a.0-131071", "b.0"], "a file"), FormatError, "more than 131072 names")


def test_names_that_are_long_and_many_are_refused_before_they_are_made() -> None:
    """Found by fuzzing: 500 bytes asked for 70 MB of names."""
    pattern = "model.layers.0-131071." + "x" * 480
    refusal(
        lambda: expand_names([pattern], "a file"), FormatError, "131072 names of some 502 characters", 8_000_000
    )


LARGEST: dict[str, bytes] = {
    "keys": b"{" + b",".join(b'"%d":0' % number for number in range(780_000)) + b"}",
    "lists": b'{"a":[' + b"[]," * 520_000 + b"[]]}",
    "texts": b'{"a":[' + b'"xxxx",' * 1_040_000 + b'""]}',
}


@pytest.mark.parametrize("text", LARGEST.values(), ids=LARGEST)
def test_the_largest_json_that_is_allowed_is_parsed_quickly_in_bounded_memory(text: bytes) -> None:
    started = time.process_time()
    with paused_collector():
        parse_json_object(text, "a file", FormatError)
    assert time.process_time() - started < MOST_SECONDS
    tracemalloc.start()
    parse_json_object(text, "a file", FormatError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_JSON_BYTES


CONFIG_FAULTS: dict[str, dict[str, Any]] = {
    "gigantic width": {"hidden_size": 2**62},
    "gigantic count of layers": {"num_hidden_layers": 2**31},
    "gigantic count of experts": {"moe_num_experts": 2**31},
    "many layers of many experts": {"num_hidden_layers": 1024, "moe_num_experts": 4096},
    "negative width": {"hidden_size": -32},
    "width of zero": {"hidden_size": 0},
    "no heads": {"num_attention_heads": 0},
    "heads a boolean": {"num_attention_heads": True},
    "width a text": {"hidden_size": "32"},
    "width a fraction": {"hidden_size": 32.5},
    "width a float beyond integers": {"hidden_size": 1e300},
    "width of four thousand digits": {"hidden_size": 10**4000},
    "width a long list": {"hidden_size": list(range(100_000))},
    "width lists in lists": {"hidden_size": json.loads("[" * 30 + "]" * 30)},
    "theta negative": {"rope_theta": -1.0},
    "theta a list in an object": {"rope_parameters": {"rope_theta": [1]}},
    "another rotation": {"rope_scaling": {"type": "yarn", "factor": 4}},
    "eps of zero": {"rms_norm_eps": 0},
    "token ids of texts": {"eos_token_id": ["</s>"]},
    "tied a number": {"tie_word_embeddings": 1},
    "architecture an object": {"architectures": [{}], "model_type": {}},
    "architecture a long text": {"architectures": ["x" * 100_000]},
    "architecture that a terminal obeys": {"architectures": ["\x1b[2J"]},
    "more chosen than there are": {"moe_k": 5},
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_a_configuration_that_asks_for_the_impossible_is_refused(fault: dict[str, Any]) -> None:
    raw = {**tiny_config(TinyOptions()), **fault}
    message = refusal(lambda: expected_parameters(ModelConfig.from_dict(raw)), CheckpointError)
    assert message.startswith("config.json")
