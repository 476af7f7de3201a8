"""Small packed checkpoints of random bytes: any bytes are a legal tile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ernieq.pack import DEFAULT_SHARD_BYTES, Manifest, PackedWriter, RawTensor, Source
from ernieq.trellis import EncodedMatrix, TrellisCode

NORM = RawTensor("BF16", (32,), bytes.fromhex("803f") * 32)
ROUTER = RawTensor("F32", (3, 32), np.linspace(-1, 1, 96, dtype="<f4").tobytes())
EXTRA = RawTensor("U8", (3,), b"\x01\x02\x03")


def random_matrix(
    out_features: int, in_features: int, bits: float, *, state_bits: int = 16, block: int = 16, seed: int = 0
) -> EncodedMatrix:
    random = np.random.default_rng(seed)
    shape = (out_features // 16, in_features // 16, int(16 * bits))
    return EncodedMatrix(
        packed=random.integers(-(1 << 15), 1 << 15, shape).astype(np.int16),
        scale=random.uniform(0.01, 1.0, out_features).astype(np.float16),
        signs=random.choice(np.array([-1, 1], dtype=np.int8), in_features),
        rotation_block=block,
        code=TrellisCode(bits, state_bits),
    )


def manifest() -> Manifest:
    return Manifest("0.1.0", Source("somewhere", "abc", {"a.safetensors": "0" * 64}), {"bits": 2}, seed=7)


def tiny_modules() -> dict[str, EncodedMatrix]:
    modules = {
        f"model.layers.{layer}.mlp.experts.{expert}.gate_proj": random_matrix(
            32, 48, 2, seed=10 * layer + expert
        )
        for layer in range(2)
        for expert in range(3)
    }
    modules["model.layers.0.self_attn.q_proj"] = random_matrix(48, 32, 4, block=32, seed=99)
    modules["model.embed_tokens"] = random_matrix(64, 32, 6, state_bits=12, seed=100)
    return modules


def write_packed(
    target: Path,
    modules: Mapping[str, EncodedMatrix] | None = None,
    *,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    with PackedWriter(target, overwrite=overwrite, shard_bytes=shard_bytes) as writer:
        for name, matrix in (tiny_modules() if modules is None else modules).items():
            writer.add_encoded(name, matrix)
        writer.add_tensor("model.norm.weight", NORM)
        writer.add_tensor("model.layers.1.mlp.gate.weight", ROUTER)
        writer.add_tensor("model.mtp_extra.weight", EXTRA, carried=True)
        return writer.finish({"model_type": "ernie4_5_moe"}, manifest(), card="# A model\n")
