"""What save_pretrained writes is the packed checkpoint again, bit for bit, and passes its checks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ernieq.errors import FormatError, UsageError
from ernieq.load import load_model
from ernieq.model import ModelConfig, expected_parameters
from ernieq.pack import PackedReader, verify_packed
from tests.decode import fake_kernels
from tests.integrations.transformers.packed_checkpoints import (
    CARD,
    TOKENS,
    assert_same_bytes,
    load,
    logits,
    stored_tensors,
    write_packed,
)
from tests.load.packed_model import MOE
from tests.load.test_load_model import CASES


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "packed")


def verify(directory: Path) -> None:
    config = ModelConfig.from_dict(PackedReader(directory).config)
    verify_packed(
        directory, expected_shapes={name: spec.shape for name, spec in expected_parameters(config).items()}
    )


@pytest.mark.parametrize(("config", "chosen"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_saved_model_holds_the_same_bytes_and_passes_verify(
    config: ModelConfig, chosen: Any, tmp_path: Path
) -> None:
    directory = write_packed(tmp_path / "packed", config, chosen)
    load(directory).save_pretrained(tmp_path / "saved")
    assert_same_bytes(stored_tensors(tmp_path / "saved"), stored_tensors(directory))
    verify(tmp_path / "saved")
    found, expected = PackedReader(tmp_path / "saved"), PackedReader(directory)
    assert found.config["quantization_config"] == expected.config["quantization_config"]
    assert found.manifest.coverage == expected.manifest.coverage
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "saved")(TOKENS), load_model(directory)(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_it_was_loaded_as_changes_no_saved_byte(dtype: torch.dtype, packed: Path) -> None:
    saved = packed.with_name("saved")
    load(packed, dtype).save_pretrained(saved)
    assert_same_bytes(stored_tensors(saved), stored_tensors(packed))
    assert json.loads((saved / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_router_in_the_first_layer_does_not_lend_its_dtype_to_the_configuration(tmp_path: Path) -> None:
    config = ModelConfig(**{**vars(MOE), "moe_layer_start_index": 0})
    load(write_packed(tmp_path / "packed", config), torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_words_of_a_gpu_are_saved_as_the_tiles_they_were(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(monkeypatch)
    model, truth = load(packed), logits(load(packed))
    fake_kernels.hold_words(model)
    assert float((logits(model) - truth).norm() / truth.norm()) < 5e-3
    model.save_pretrained(packed.with_name("saved"))
    assert_same_bytes(stored_tensors(packed.with_name("saved")), stored_tensors(packed))


def test_shards_are_cut_as_asked_for(packed: Path) -> None:
    saved = packed.with_name("saved")
    model = load(packed)
    model.save_pretrained(saved, max_shard_size="20KB")
    assert len(PackedReader(saved).shard_files()) > 1
    verify(saved)
    model.save_pretrained(saved)  # one file over several, and several over one
    assert PackedReader(saved).shard_files() == ["model.safetensors"]
    verify(saved)
    model.save_pretrained(saved, max_shard_size="20KB")
    verify(saved)
    assert_same_bytes(stored_tensors(saved), stored_tensors(packed))


def test_a_model_can_be_saved_over_itself_and_again(packed: Path) -> None:
    before = stored_tensors(packed)
    model = load(packed)
    for _ in range(2):
        model.save_pretrained(packed)
        assert_same_bytes(stored_tensors(packed), before)
        verify(packed)
    assert "tokenizer.json" in {file.name for file in packed.iterdir()}


def test_the_card_goes_along_and_the_tokenizer_saves_itself(packed: Path) -> None:
    saved = packed.with_name("saved")
    load(packed).save_pretrained(saved)
    AutoTokenizer.from_pretrained(packed).save_pretrained(saved)
    assert (saved / "README.md").read_text() == CARD
    verify(saved)


def test_a_copy_of_a_model_saves_itself(packed: Path) -> None:
    copied = copy.deepcopy(load(packed))
    copied.model.norm.weight.data.mul_(2)
    copied.save_pretrained(packed.with_name("saved"))
    found = stored_tensors(packed.with_name("saved"))["model.norm.weight"]
    assert torch.equal(found, 2 * stored_tensors(packed)["model.norm.weight"])


def test_a_norm_that_was_changed_is_saved_so_and_counts_as_tuned(packed: Path) -> None:
    saved = packed.with_name("saved")
    model = load(packed)
    model.model.norm.weight.data.mul_(2)
    model.save_pretrained(saved)
    found, expected = stored_tensors(saved), stored_tensors(packed)
    assert torch.equal(found.pop("model.norm.weight"), 2 * expected.pop("model.norm.weight"))
    assert_same_bytes(found, expected)
    coverage = PackedReader(saved).manifest.coverage
    assert coverage is not None
    assert coverage.tuned == ("model.norm.weight",)
    verify(saved)


@pytest.mark.parametrize(
    "options", [{"variant": "fp16"}, {"save_original_format": False}, {"state_dict": {"a": torch.ones(1)}}]
)
def test_an_option_that_would_give_another_format_is_refused(options: dict[str, Any], packed: Path) -> None:
    with pytest.raises(UsageError, match=f"leave {next(iter(options))} out"):
        load(packed).save_pretrained(packed.with_name("saved"), **options)
    assert not packed.with_name("saved").exists()


def test_a_checkpoint_that_has_changed_since_is_not_mixed_in(packed: Path) -> None:
    model = load(packed)
    manifest = packed / "ernieq.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(FormatError, match="has changed since the model was loaded"):
        model.save_pretrained(packed.with_name("saved"))
