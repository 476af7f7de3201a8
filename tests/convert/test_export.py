"""An exported checkpoint is an ordinary one that holds exactly what the packed one stands for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ernieq.convert import export as export_module
from ernieq.convert.export import decode_rows, export_bf16
from ernieq.errors import FormatError, OutputExistsError, StorageError
from ernieq.kernels.backend import Backend
from ernieq.model import ParameterRole
from ernieq.trellis import EncodedMatrix
from tests.load.packed_model import MOE, by_role, write_model
from tests.pack.packed_factory import random_matrix
from tests.pack.packed_model import pack_model, source_model

# Half a unit in the last place of bfloat16 (8 significant bits), relative, and a little for the float32 sums.
HALF_UNIT = 2**-8 * 1.001


def decoded(matrix: EncodedMatrix) -> NDArray[np.float64]:
    """W = diag(scale) (V / 128) H diag(signs), with a dense Hadamard matrix in float64."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < matrix.rotation_block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    blocks = matrix.in_features // matrix.rotation_block
    rotation = np.kron(np.eye(blocks), hadamard / np.sqrt(matrix.rotation_block)) * matrix.signs
    return np.asarray(matrix.rotated_weight().astype(np.float64) @ rotation)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, EncodedMatrix]]:
    directory = tmp_path_factory.mktemp("export")
    modules = pack_model(source_model(directory / "source"), directory / "packed")
    return directory / "packed", modules


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def test_exported_weights_are_the_decoded_ones_rounded_to_bf16(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path
) -> None:
    path, modules = packed
    report = export_bf16(path, tmp_path / "plain", shard_bytes=20_000, threads=1)
    assert report.shards > 1
    found, original = stored_tensors(tmp_path / "plain"), stored_tensors(path.parent / "source")
    for module, matrix in modules.items():
        weight = found.pop(f"{module}.weight")
        assert weight.dtype is torch.bfloat16
        np.testing.assert_allclose(weight.double().numpy(), decoded(matrix), rtol=HALF_UNIT, atol=1e-7)
    assert torch.equal(found.pop("model.mtp_norm.0.weight"), torch.ones(2, dtype=torch.bfloat16))
    for name, tensor in found.items():
        assert tensor.dtype is original[name].dtype
        assert torch.equal(tensor, original[name])


def test_transformers_loads_the_export_without_a_missing_key(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path
) -> None:
    path, modules = packed
    export_bf16(path, tmp_path / "plain", threads=1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    embedding = model.get_input_embeddings().weight
    np.testing.assert_allclose(
        embedding.detach().double().numpy(), decoded(modules["model.embed_tokens"]), rtol=HALF_UNIT, atol=1e-7
    )
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_head_stored_beside_its_tied_embedding_does_not_win_over_the_decoded_table(tmp_path: Path) -> None:
    stale = {"lm_head.weight": torch.ones(MOE.vocab_size, MOE.hidden_size)}
    for tied in (True, False):
        config = dataclasses.replace(MOE, tie_word_embeddings=tied)
        chosen = by_role({ParameterRole.EMBEDDING})
        write_model(tmp_path / f"{tied}", config, chosen, extra=stale if tied else None)
        export_bf16(tmp_path / f"{tied}", tmp_path / f"plain-{tied}", threads=1)
        assert ("lm_head.weight" in stored_tensors(tmp_path / f"plain-{tied}")) is not tied
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain-True")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_config_and_tokenizer_are_those_of_an_ordinary_checkpoint(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path
) -> None:
    path, _ = packed
    export_bf16(path, tmp_path / "plain", threads=1)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (tmp_path / "plain" / "tokenizer.json").read_text() == '{"version": "1.0"}'


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.AUTO])
def test_any_chunking_decodes_the_same_rows(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(80, 48, 3)
    whole = torch.cat(list(decode_rows(matrix, backend=backend, threads=1)))
    monkeypatch.setattr(export_module, "_CHUNK_WEIGHTS", 2 * 16 * 48)
    chunks = list(decode_rows(matrix, backend=backend, threads=1))
    assert [chunk.shape[0] for chunk in chunks] == [32, 32, 16]
    assert torch.equal(torch.cat(chunks), whole)


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_an_output_that_overlaps_the_input_is_refused(
    packed: tuple[Path, dict[str, EncodedMatrix]], place: str
) -> None:
    path, _ = packed
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(OutputExistsError, match="input"):
        export_bf16(path, path / place, overwrite=True)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_an_existing_output_is_refused_without_overwrite(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        export_bf16(packed[0], tmp_path / "plain")


def test_too_little_disk_is_refused_before_anything_is_written(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="free"):
        export_bf16(packed[0], tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_nothing(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, names: set[str], what: str) -> None:
        raise KeyError

    monkeypatch.setattr(export_module, "check_written", fail)
    with pytest.raises(KeyError):
        export_bf16(packed[0], tmp_path / "plain", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_checkpoint_can_not_be_exported(
    packed: tuple[Path, dict[str, EncodedMatrix]], tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="not a packed checkpoint"):
        export_bf16(packed[0].parent / "source", tmp_path / "plain")
