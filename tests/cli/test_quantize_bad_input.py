"""Whatever is wrong with the input: one sentence, an exit code, nothing written, the input untouched."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.quantizing import Untouched, done, quantize, refused
from tests.convert.conversions import write_words
from tests.tiny import TinyOptions, tiny_tensors, write_tensors, write_tiny

EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
Damage = Callable[[Path], None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_words(tmp_path / "words.txt")
    return write_tiny(tmp_path / "source")


def check(source: Path, out: Path, exit_code: int, *naming: str, options: tuple[str | Path, ...] = ()) -> None:
    """Quantizing is refused, and the whole directory of the test is as it was but for finished work."""
    before = Untouched(source.parent)
    refused(quantize(source, out, *options), exit_code, *naming)
    before.check(unfinished=True)


def tensors_changed(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(source: Path) -> None:
        tensors = tiny_tensors(TinyOptions())
        change(tensors)
        write_tensors(source, tensors)

    return damage


def set_value(name: str, value: float) -> Damage:
    return tensors_changed(lambda tensors: tensors[name].view(-1)[3].fill_(value))


def truncate(source: Path) -> None:
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def corrupt(source: Path) -> None:
    shard = source / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[8:40] = b"\xff" * 32
    shard.write_bytes(raw)


def name_a_missing_file(source: Path) -> None:
    (source / "model.safetensors").unlink()
    write_tensors(source, tiny_tensors(TinyOptions()), shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()


def change_config(**changes: Any) -> Damage:
    def damage(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def break_config(source: Path) -> None:
    (source / "config.json").write_text("{")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (tensors_changed(lambda tensors: tensors.pop(EXPERT)), EXPERT),
    "extra tensor": (
        tensors_changed(
            lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": torch.ones(16, 16)})
        ),
        "model.layers.1.mlp.extra.weight",
    ),
    "wrong shape": (tensors_changed(lambda tensors: tensors.update({EXPERT: torch.ones(16, 32)})), EXPERT),
    "integer weights": (
        tensors_changed(lambda tensors: tensors.update({EXPERT: torch.ones(32, 16, dtype=torch.int8)})),
        EXPERT,
    ),
    "NaN in an expert": (set_value(EXPERT, float("nan")), EXPERT),
    "infinity in the embedding": (
        set_value("model.embed_tokens.weight", float("inf")),
        "model.embed_tokens.weight",
    ),
    "NaN in a norm": (
        set_value("model.layers.2.input_layernorm.weight", float("nan")),
        "model.layers.2.input_layernorm.weight",
    ),
    "NaN in the final norm": (set_value("model.norm.weight", float("nan")), "model.norm.weight"),
    "NaN in the router": (
        set_value("model.layers.1.mlp.gate.weight", float("nan")),
        "model.layers.1.mlp.gate.weight",
    ),
    "infinity in the router's bias": (
        set_value("model.layers.1.mlp.moe_statics.e_score_correction_bias", float("-inf")),
        "model.layers.1.mlp.moe_statics.e_score_correction_bias",
    ),
    "truncated shard": (truncate, "model.safetensors"),
    "corrupt header": (corrupt, "model.safetensors"),
    "index naming a missing file": (name_a_missing_file, "model-00002-of-00002.safetensors"),
    "another architecture": (change_config(architectures=["LlamaForCausalLM"], model_type="llama"), "llama"),
    "quantized already": (change_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "broken config": (break_config, "config.json"),
    "no config": (lambda source: (source / "config.json").unlink(), "config.json"),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "source"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGES.values(), ids=DAMAGES)
def test_a_broken_checkpoint_is_refused_and_nothing_is_left(
    source: Path, tmp_path: Path, damage: Damage, name: str
) -> None:
    damage(source)
    check(source, tmp_path / "packed", 3, name)


@pytest.mark.parametrize(
    "content", ["", " \n\t\n", "w3 w4 w5", b"w3 \xff w4"], ids=["empty", "blank", "short", "bytes"]
)
def test_a_text_that_is_no_sample_is_refused(source: Path, tmp_path: Path, content: str | bytes) -> None:
    text = tmp_path / "bad.txt"
    text.write_bytes(content.encode() if isinstance(content, str) else content)
    check(
        source,
        tmp_path / "packed",
        4,
        "tokens" if content == "w3 w4 w5" else "bad.txt",
        options=("--text", text),
    )


def test_a_missing_text_is_refused(source: Path, tmp_path: Path) -> None:
    check(source, tmp_path / "packed", 4, "none.txt", options=("--text", tmp_path / "none.txt"))


def test_a_jsonl_line_without_a_text_is_refused_by_its_number(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "bad.jsonl"
    text.write_text('{"text": "w3"}\n{"txt": "w4"}\n')
    check(source, tmp_path / "packed", 4, "bad.jsonl", "line 2", options=("--text", text))


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    write_words(tmp_path / "words.txt")
    check(tmp_path / "none", tmp_path / "packed", 3, "none")


def test_an_output_that_exists_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "notes.txt").write_text("mine")
    check(source, tmp_path / "packed", 2, "packed", "--overwrite")


def test_a_directory_that_holds_no_model_is_not_even_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "notes.txt").write_text("mine")
    check(source, tmp_path / "packed", 2, "packed", options=("--overwrite",))


@pytest.mark.parametrize("place", ["source", "source/packed", ".", "link", "source/../source"])
def test_an_output_that_is_holds_or_lies_in_the_input_is_refused_even_with_overwrite(
    source: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "link").symlink_to(source)
    check(source, tmp_path / place, 2, "input", options=("--overwrite",))


def test_too_little_disk_is_refused_before_work_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    check(source, tmp_path / "packed", 5, "free", str(tmp_path))


@pytest.mark.parametrize(
    ("method", "number"),
    [("add_encoded", errno.ENOSPC), ("add_tensor", errno.ENOSPC), ("finish", errno.EIO)],
)
def test_a_disk_that_fails_in_mid_write_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int
) -> None:
    from ernieq.pack import PackedWriter

    genuine, calls = getattr(PackedWriter, method), 0

    def fail(self: PackedWriter, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if method == "finish" or calls == 5:  # some tensors have been written
            raise OSError(number, "the test's disk", str(tmp_path / "packed"))
        return genuine(self, *arguments, **options)

    monkeypatch.setattr(PackedWriter, method, fail)
    check(source, tmp_path / "packed", 5, "packed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_really_full_is_reported_as_that(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Path.open

    def on_a_full_disk(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        written = ".partial" in str(path) and "r" not in mode
        return genuine(Path("/dev/full") if written else path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    check(source, tmp_path / "packed", 5, "packed", "No space left on device")


def test_a_failing_disk_keeps_the_output_that_was_to_be_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernieq.pack import PackedWriter

    done(quantize(source, tmp_path / "packed"))

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "the test's disk", str(tmp_path / "packed"))

    monkeypatch.setattr(PackedWriter, "finish", fail)
    check(source, tmp_path / "packed", 5, "packed", options=("--overwrite", "--seed", "1"))


def test_an_interruption_leaves_finished_work_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ernieq.convert import LayerQuantizer

    def interrupt(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerQuantizer, "run", interrupt)
    before = Untouched(tmp_path)
    result = quantize(source, tmp_path / "packed")
    assert result.exit_code == 130
    assert result.stderr.count("\n") == 1
    before.check(unfinished=True)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("[parts]\nrouter = 4", "router"),
        ("[parts]\nnorms = 4", "norms"),
        ('[modules]\n"*.mlp.gate" = 4', "gate"),
        ('[modules]\n"*layernorm*" = 4', "layernorm"),
        ("[parts]\nattention = 9", "attention"),
        ("[parts]\nattention = 1", "attention"),
        ("bits = 7", "7"),
        ("[encode]\ndamping = -1", "damping"),
        ("[encode]\nfirst_pass_steps = 98", "multiple of 4"),
        ("[parts]\nattention = 4.25", "4.25"),
        ("colour = 1", "colour"),
        ("bits = ", "recipe.toml"),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_done_is_refused(
    source: Path, tmp_path: Path, lines: str, name: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(lines)
    check(source, tmp_path / "packed", 2, name, options=("--recipe", recipe))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--bits", "7"), "1.5 to 6 bits in halves"),
        (("--bits", "1"), "--bits is 1;"),
        (("--bits", "2.25"), "--bits is 2.25"),
        (("--bits", "nan"), "--bits is nan"),
        (("--attention-bits", "9"), "attention"),
        (("--attention-bits", "6.5"), "6.5; bits are 1.5 to 6 in halves, 7, 8, or 16 to keep the source"),
        (("--head-bits", "inf"), "head"),
        (("--shared-bits", "8"), "10 state bits"),
        (("--state-bits", "9"), "state"),
        (("--state-bits", "17"), "state"),
        (("--embedding-bits", "6"), "10 state bits"),
    ],
)
def test_bits_out_of_range_are_refused(
    source: Path, tmp_path: Path, options: tuple[str, str], name: str
) -> None:
    check(source, tmp_path / "packed", 2, name, options=options)
