"""Rows of zeros are counted and named, and a conversion of them is legal and decodes to almost nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ernieq.calibrate import LayerStatistics
from ernieq.checkpoint import load_embedding, load_layer, open_checkpoint
from ernieq.convert import HessianDirectory, SourceScan, calibration_record, collect_statistics, draw_sample
from ernieq.convert.export import decode_rows
from ernieq.pack import PackedReader, verify_packed
from tests.convert.conversions import convert, decoded_model, logits_of, quick_recipe, write_words
from tests.tiny import TinyOptions, tiny_tensors, write_tensors, write_tiny

EMBEDDING = "model.embed_tokens.weight"
GATE, UP, DOWN = (f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up", "down"))
OUTPUT = "model.layers.0.self_attn.o_proj.weight"
KEYS = "model.layers.2.self_attn.k_proj.weight"
# Matrix -> rows that are all zeros.
ZEROS: dict[str, dict[str, slice]] = {
    "unused tokens": {EMBEDDING: slice(48, 64)},
    "dead channels": {UP: slice(0, 3), OUTPUT: slice(5, 6), "model.layers.0.mlp.gate_proj.weight": slice(0, 9)},
    "a matrix": {KEYS: slice(None)},
    "a down": {DOWN: slice(None)},
    "an expert": {GATE: slice(None), UP: slice(None), DOWN: slice(None)},
    "all of a layer's downs": {
        f"model.layers.1.mlp.{part}.down_proj.weight": slice(None)
        for part in ("shared_experts", *(f"experts.{number}" for number in range(4)))
    },
}


def write_zeros(directory: Path, zeros: Mapping[str, slice]) -> Path:
    source, tensors = write_tiny(directory), tiny_tensors(TinyOptions())
    for name, rows in zeros.items():
        tensors[name][rows] = 0
    write_tensors(source, tensors)
    return source


def decoded(packed: Path, name: str) -> Tensor:
    return torch.cat(list(decode_rows(PackedReader(packed).encoded(name.removesuffix(".weight")), threads=1)))


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS)
def test_rows_of_zeros_are_counted_by_matrix(tmp_path: Path, zeros: dict[str, slice]) -> None:
    checkpoint = open_checkpoint(write_zeros(tmp_path / "source", zeros))
    scan = SourceScan(checkpoint)
    for _ in range(2):  # a second reading counts nothing twice
        load_embedding(checkpoint)
        for index in range(3):
            load_layer(checkpoint, index)
    found = {matrix.name: (matrix.zero, matrix.rows) for matrix in scan.zero_rows}
    shapes = {name: checkpoint.info(name).shape[0] for name in zeros}
    assert found == {name: (len(range(*zeros[name].indices(rows))), rows) for name, rows in shapes.items()}
    first = min(zeros)
    assert first in scan.summary()
    assert "all finite" in scan.summary()


def test_a_source_without_such_rows_is_said_to_have_none(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "source", shards=3, router_bias=0.0))
    scan = SourceScan(checkpoint)
    assert (
        scan.headers() == f"source: 3 weight files, {len(checkpoint.names())} tensors, headers and sizes agree"
    )
    load_layer(checkpoint, 1)
    assert scan.summary() == "source: 23 tensors read, all finite, no row of zeros"


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS)
def test_rows_of_zeros_make_a_legal_file_that_decodes_them_to_almost_nothing(
    tmp_path: Path, zeros: dict[str, slice]
) -> None:
    source, packed = write_zeros(tmp_path / "source", zeros), tmp_path / "packed"
    convert(source, packed, quick_recipe())
    verify_packed(packed)
    for name, rows in zeros.items():
        found = decoded(packed, name)[rows]
        assert torch.isfinite(found).all()
        # Downs and outputs are led back toward the bf16 model's, so that a row of zeros need not stay one.
        if not name.endswith(("down_proj.weight", "o_proj.weight")):
            assert float(found.abs().max()) < 3e-7
    logits = logits_of(decoded_model(source, packed))
    assert torch.isfinite(logits).all()


def test_stored_hessians_of_zeros_make_a_legal_file(tmp_path: Path) -> None:
    zeros = ZEROS["an expert"] | ZEROS["all of a layer's downs"] | ZEROS["unused tokens"]
    source = write_zeros(tmp_path / "source", zeros)
    from ernieq.calibrate import read_text_file

    checkpoint, recipe = open_checkpoint(source), quick_recipe()
    sample = draw_sample(checkpoint, [read_text_file(write_words(tmp_path / "words.txt"))], recipe)
    (tmp_path / "hessians").mkdir()
    store = HessianDirectory(tmp_path / "hessians")

    def write(index: int, found: LayerStatistics) -> None:
        store.write_layer(index, found)

    collect_statistics(checkpoint, sample, 1.0, write)
    record = calibration_record(sample)
    store.write_summary({"calibration": {**vars(record), "files": dict(record.files)}})
    convert(source, tmp_path / "packed", recipe, hessians=store)
    verify_packed(tmp_path / "packed")
    for name in (EMBEDDING, UP, DOWN):  # nothing is corrected: zeros stay zeros
        assert float(decoded(tmp_path / "packed", name)[zeros[name]].abs().max()) < 3e-7
