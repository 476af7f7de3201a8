"""Quick conversions of small random checkpoints, and what their tests compare."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ernieq.calibrate import read_text_file
from ernieq.checkpoint import open_checkpoint
from ernieq.convert import (
    CalibrationSettings,
    Conversion,
    ConversionReport,
    EncodeSettings,
    HessianDirectory,
    Part,
    Recipe,
    default_recipe,
)
from ernieq.convert.export import decode_rows
from ernieq.encode import EncodeOptions
from ernieq.load import load_model
from ernieq.model import ErnieForCausalLM
from ernieq.pack import PackedReader

VOCABULARY = 64  # of tests.tiny


def words(count: int, seed: int = 0) -> str:
    """Text of words that the tokenizer of ``tests.tiny`` knows; some are frequent, some rare."""
    draw = random.Random(seed)
    return " ".join(f"w{3 + int((VOCABULARY - 3) * draw.random() ** 2)}" for _ in range(count))


def write_words(path: Path, count: int = 400, seed: int = 0) -> Path:
    path.write_text(words(count, seed), encoding="utf-8")
    return path


def quick_recipe(
    bits: float = 2,
    *,
    parts: Mapping[Part, float] | None = None,
    modules: Mapping[str, float] | None = None,
    windows: int = 4,
    correction_damping: float = EncodeSettings.correction_damping,
    seed: int = 0,
) -> Recipe:
    """A recipe of a second: a short trellis state, four windows of 32 tokens."""
    recipe = default_recipe(bits)
    short = {Part.EMBEDDING: 5, Part.HEAD: 5}  # ten state bits are too few for six bits a weight
    return dataclasses.replace(
        recipe,
        parts={**recipe.parts, **short, **(parts or {})},
        modules=modules or {},
        encode=EncodeSettings(state_bits=10, correction_damping=correction_damping),
        calibration=CalibrationSettings(windows=windows, window=32),
        seed=seed,
    )


def convert(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    text: Path | None = None,
    threads: int = 1,
    hessians: HessianDirectory | None = None,
) -> ConversionReport:
    """Quantize ``source``; the text is written beside the output unless one is given."""
    calibration = hessians or [read_text_file(text or write_words(out.with_suffix(".txt")))]
    checkpoint = open_checkpoint(source)
    conversion = Conversion(checkpoint, str(source), recipe, calibration, EncodeOptions(threads=threads))
    report = conversion.run(out, overwrite=False, card=lambda _: "# a test\n")
    checkpoint.close()
    return report


def file_hashes(directory: Path, pattern: str = "**/*") -> dict[str, str]:
    """sha256 of every file below a directory, by its relative name."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    }


def decoded_model(source: Path, packed: Path) -> ErnieForCausalLM:
    """The source's plain float32 model with every quantized matrix replaced by what it decodes to."""
    model, reader = load_model(source), PackedReader(packed)
    for module in reader.modules():
        weight = torch.cat(list(decode_rows(reader.encoded(module), threads=1)))
        model.get_parameter(f"{module}.weight").data.copy_(weight)
    return model


@torch.no_grad()
def logits_of(model: ErnieForCausalLM, length: int = 24) -> Tensor:
    """Logits of two fixed sequences of tokens that no calibration text holds in this order."""
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(7))
    logits: Tensor = model(tokens)
    return logits
