"""A slow reader and maker of packed checkpoints, written from ernieq/pack/FORMAT.md alone.

It shares no code with ernieq and computes with Python integers only, so that it can be the truth for the fast
code. ``python tests/golden/format_oracle.py VERSION DIRECTORY`` makes the golden checkpoint of a format version
and its expected integers. Section numbers are those of FORMAT.md.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

OUT_FEATURES, IN_FEATURES = 32, 48


@dataclass(frozen=True)
class GoldenModule:
    """What a module of the golden checkpoint is made with."""

    name: str
    bits: float
    state_bits: int = 16
    rotation_block: int = 16

    @property
    def pair_bits(self) -> int:
        """2 K."""
        return round(2 * self.bits)


MODULES = {
    "0.1": (
        GoldenModule("model.layers.0.mlp.gate_proj", 2),
        GoldenModule("model.layers.0.mlp.up_proj", 3),
        GoldenModule("model.layers.0.mlp.down_proj", 4),
        GoldenModule("model.layers.1.self_attn.q_proj", 5),
        GoldenModule("model.layers.1.self_attn.o_proj", 6),
        GoldenModule("model.layers.1.mlp.gate_proj", 2, state_bits=12, rotation_block=4),
    ),
    # The whole rates of 0.1 are unchanged; these are what 0.2 adds, beside one of them.
    "0.2": (
        GoldenModule("model.layers.0.mlp.gate_proj", 2),
        GoldenModule("model.layers.0.mlp.up_proj", 1.5),
        GoldenModule("model.layers.0.mlp.down_proj", 2.5),
        GoldenModule("model.layers.0.self_attn.q_proj", 3.5),
        GoldenModule("model.layers.0.self_attn.k_proj", 4.5),
        GoldenModule("model.layers.1.self_attn.q_proj", 5.5),
        GoldenModule("model.layers.1.self_attn.k_proj", 7),
        GoldenModule("model.layers.1.self_attn.o_proj", 8),
        GoldenModule("model.layers.1.mlp.gate_proj", 2.5, state_bits=12, rotation_block=4),
    ),
}


# ------------------------------------------------------------------------------------------- decoding, 3 to 5


def position_in_tile(t: int) -> tuple[int, int]:
    """Row and column of weight t (section 4, Order)."""
    lane, j = t // 8, t % 8
    return lane // 4 + 8 * ((j // 2) % 2), 2 * (lane % 4) + j % 2 + 8 * (j // 4)


def ring_bits(units: list[int]) -> list[int]:
    """Bits of the ring (section 4, Units): the highest bit of a unit comes first."""
    return [(unit >> (15 - place)) & 1 for unit in units for place in range(16)]


def end_of(t: int, pair_bits: int) -> int:
    """The bit of the ring that follows the symbol of weight t (section 4, Ring)."""
    return t // 2 * pair_bits + (pair_bits if t % 2 else pair_bits // 2)


def state_of(bits: list[int], t: int, pair_bits: int, state_bits: int) -> int:
    """State of weight t (section 5): the bits that end with its symbol, wrapping around."""
    state = 0
    for position in range(end_of(t, pair_bits) - state_bits, end_of(t, pair_bits)):
        state = state * 2 + bits[position % len(bits)]
    return state


def value_of(state: int) -> int:
    """Value of a state (section 5)."""
    x = (0x83DCD12D * state) % 2**32
    return sum(x.to_bytes(4, "little")) - 510


def decode_tile(units: list[int], pair_bits: int, state_bits: int) -> list[list[int]]:
    """The 16 x 16 integers of a tile."""
    bits = ring_bits(units)
    tile = [[0] * 16 for _ in range(16)]
    for t in range(256):
        row, column = position_in_tile(t)
        tile[row][column] = value_of(state_of(bits, t, pair_bits, state_bits))
    return tile


def decode_matrix(packed: bytes, rows: int, columns: int, pair_bits: int, state_bits: int) -> list[list[int]]:
    """V of a matrix (section 3) from the bytes of its ``weight_packed``."""
    units = [int.from_bytes(packed[i : i + 2], "little") for i in range(0, len(packed), 2)]
    matrix = [[0] * columns for _ in range(rows)]
    for row_tile in range(rows // 16):
        for column_tile in range(columns // 16):
            start = (row_tile * (columns // 16) + column_tile) * 8 * pair_bits
            tile = decode_tile(units[start : start + 8 * pair_bits], pair_bits, state_bits)
            for r in range(16):
                matrix[16 * row_tile + r][16 * column_tile : 16 * column_tile + 16] = tile[r]
    return matrix


def sign_of(signs: bytes, channel: int) -> int:
    """Sign of an input channel (section 3)."""
    return -1 if signs[channel // 8] >> (channel % 8) & 1 else 1


def hadamard_entry(i: int, j: int) -> int:
    """Entry of the Sylvester matrix, by its recursion."""
    entry = 1
    while i or j:
        if i % 2 and j % 2:
            entry = -entry
        i, j = i // 2, j // 2
    return entry


def unrotate_row(values: list[int], signs: bytes, block: int) -> list[int]:
    """``sqrt(block) * (V R)`` of one row, which is an integer (section 3)."""
    return [
        sign_of(signs, c) * sum(values[c - c % block + i] * hadamard_entry(i, c % block) for i in range(block))
        for c in range(len(values))
    ]


# ------------------------------------------------------------------------------------------- writing, 2, 6, 7


class Bytes:
    """A stream of bytes that every Python makes alike (the middle of a 64-bit linear congruence)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def take(self, count: int) -> bytes:
        result = bytearray()
        for _ in range(count):
            self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
            result.append(self.state >> 40 & 0xFF)
        return bytes(result)


@dataclass(frozen=True)
class GoldenTensor:
    name: str
    dtype: str
    shape: list[int]
    data: bytes


def module_tensors(module: GoldenModule, source: Bytes) -> list[GoldenTensor]:
    """Three tensors (section 3); F16 scales between 2^-8 and 2^-7 with random fractions, some negative."""
    packed = source.take(2 * 8 * module.pair_bits * (OUT_FEATURES // 16) * (IN_FEATURES // 16))
    halves = [
        (7 << 10) | int.from_bytes(source.take(2), "little") % 1024 | (source.take(1)[0] & 1) << 15
        for _ in range(OUT_FEATURES)
    ]
    scale = b"".join(half.to_bytes(2, "little") for half in halves)
    shape = [OUT_FEATURES // 16, IN_FEATURES // 16, 8 * module.pair_bits]
    return [
        GoldenTensor(f"{module.name}.weight_packed", "I16", shape, packed),
        GoldenTensor(f"{module.name}.weight_scale", "F16", [OUT_FEATURES], scale),
        GoldenTensor(f"{module.name}.weight_signs", "U8", [IN_FEATURES // 8], source.take(IN_FEATURES // 8)),
    ]


def power_of_two(length: int) -> int:
    power = 64
    while length % power:
        power //= 2
    return power


def shard_bytes(tensors: list[GoldenTensor]) -> bytes:
    """A shard (section 2)."""
    ordered = sorted(tensors, key=lambda tensor: -power_of_two(len(tensor.data)))
    fields, position = ['"__metadata__":{"format":"pt"}'], 0
    for tensor in ordered:
        end = position + len(tensor.data)
        shape = ",".join(map(str, tensor.shape))
        fields.append(
            f'"{tensor.name}":{{"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{position},{end}]}}'
        )
        position = end
    header = ("{" + ",".join(fields) + "}").encode()
    while (8 + len(header)) % 64:
        header += b" "
    return len(header).to_bytes(8, "little") + header + b"".join(tensor.data for tensor in ordered)


def golden_tensors(version: str) -> list[GoldenTensor]:
    source = Bytes(20260101)
    tensors = [tensor for module in MODULES[version] for tensor in module_tensors(module, source)]
    tensors.append(GoldenTensor("model.norm.weight", "BF16", [5], bytes.fromhex("803f003f40bf00c00000")))
    tensors.append(GoldenTensor("model.mtp.odd", "U8", [3], bytes([1, 2, 3])))
    return tensors


def config_json(version: str) -> dict[str, object]:
    entries = {
        module.name: {"bits": module.bits, "rotation_block": module.rotation_block}
        | ({"state_bits": module.state_bits} if module.state_bits != 16 else {})
        for module in MODULES[version]
    }
    quantization = {"quant_method": "ernieq", "format_version": version, "state_bits": 16, "modules": entries}
    return {"model_type": "ernie4_5", "quantization_config": quantization}


def manifest_json(version: str, shard: bytes, tokenizer: bytes) -> dict[str, object]:
    return {
        "ernieq_version": "0.1.0",
        "format_version": version,
        "created": "2026-01-01T00:00:00+00:00",
        "source": {"name_or_path": "golden", "revision": None, "files": {}},
        "recipe": {},
        "seed": 0,
        "calibration": None,
        "tensors": {
            "quantized": [f"{module.name}.weight" for module in MODULES[version]],
            "kept": ["model.norm.weight"],
            "carried": ["model.mtp.odd"],
        },
        "shards": {"model.safetensors": hashlib.sha256(shard).hexdigest()},
        "files": {"tokenizer.json": hashlib.sha256(tokenizer).hexdigest()},
        "report": {},
    }


def expected_json(version: str) -> dict[str, object]:
    """For every module: V row by row, and the un-rotated first row times sqrt(block)."""
    data = {tensor.name: tensor.data for tensor in golden_tensors(version)}
    expected: dict[str, object] = {}
    for module in MODULES[version]:
        packed, signs = data[f"{module.name}.weight_packed"], data[f"{module.name}.weight_signs"]
        values = decode_matrix(packed, OUT_FEATURES, IN_FEATURES, module.pair_bits, module.state_bits)
        expected[module.name] = {
            "values": values,
            "first_row_unrotated": unrotate_row(values[0], signs, module.rotation_block),
        }
    return expected


def golden_files(version: str) -> dict[str, bytes]:
    """All files of the golden checkpoint, and ``expected.json`` beside them."""
    shard, tokenizer = shard_bytes(golden_tensors(version)), b"{}\n"
    return {
        "model.safetensors": shard,
        "tokenizer.json": tokenizer,
        "config.json": json.dumps(config_json(version), indent=2).encode() + b"\n",
        "ernieq.json": json.dumps(manifest_json(version, shard, tokenizer), indent=2).encode() + b"\n",
        "expected.json": json.dumps(expected_json(version), separators=(",", ":")).encode() + b"\n",
    }


def main() -> None:
    version, directory = sys.argv[1], Path(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in golden_files(version).items():
        (directory / name).write_bytes(content)


if __name__ == "__main__":
    main()
