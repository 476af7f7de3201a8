"""``quantize`` with a target in place of bits: sizes hold on disk, refusals are one sentence, bytes repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernieq.checkpoint import open_checkpoint
from ernieq.cli import allocating
from ernieq.convert import Estimate
from ernieq.load import open_stream
from ernieq.pack import PackedReader
from tests.cli.quantizing import done, quantize, refused, run
from tests.convert.conversions import file_hashes, write_words

FREE = ["--state-bits", "10", "--threads", "1", "--device", "cpu", "--windows", "8", "--window", "32"]


def source_of(tiny: Callable[..., Path], **options: Any) -> Path:
    source = tiny(**options)
    write_words(source.parent / "words.txt", 800)
    return source


def allocate(source: Path, out: Path, *options: str | Path) -> Any:
    """Quantize with free embedding and head; the text lies beside the source."""
    return run("quantize", source, "--out", out, "--text", source.parent / "words.txt", *FREE, *options)


def file_bytes(packed: Path) -> int:
    return sum(path.stat().st_size for path in packed.glob("*.safetensors"))


@pytest.mark.parametrize(
    "options", [{}, {"tied": False}, {"moe": False}, {"shared_experts": 0, "shards": 3}, {"mtp": True}], ids=str
)
def test_the_files_are_never_larger_than_asked_for(
    tiny: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    source = source_of(tiny, **options)
    smallest = refused(allocate(source, tmp_path / "no", "--target-size", "1kB"), 2, "smallest").split()[-1]
    kilobytes = float(smallest.removesuffix("kB"))
    for number, size in enumerate((kilobytes, kilobytes * 1.13, kilobytes * 1.4)):
        done(allocate(source, tmp_path / f"{number}", "--target-size", f"{size:.2f}kB"))
        assert 0.85 * 1000 * size < file_bytes(tmp_path / f"{number}") <= 1000 * size + 10
    done(run("verify", tmp_path / "1"))


def test_a_decoder_size_is_that_of_the_decoder_layers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(tiny)
    done(quantize(source, tmp_path / "packed", "--target-decoder-size", "17kB"))
    decoder = open_stream(tmp_path / "packed").weight_bytes()["decoder"]
    assert 16_000 < decoder <= 17_000
    assert PackedReader(tmp_path / "packed").code_of("model.embed_tokens").bits_per_weight == 5


def test_bits_per_parameter_are_those_that_the_result_reports(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    report = json.loads(done(allocate(source_of(tiny), tmp_path / "packed", "--target-bpw", "7", "--json")))
    assert 6 < report["bits_per_weight"] <= 7


def test_parts_with_bits_of_their_own_keep_them(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[parts]\nshared_experts = 3\n[modules]\n"*.experts.1.up_proj" = 4\n')
    options = ("--target-bpw", "8", "--attention-bits", "5", "--recipe", recipe)
    done(allocate(source_of(tiny), tmp_path / "packed", *options))
    reader = PackedReader(tmp_path / "packed")
    bits = {module: reader.code_of(module).bits_per_weight for module in reader.modules()}
    assert {bits[module] for module in bits if ".self_attn." in module} == {5}
    assert {bits[module] for module in bits if ".shared_experts." in module} == {3}
    assert {bits[module] for module in bits if ".experts.1.up_proj" in module} == {4}


def test_the_same_target_gives_the_same_bytes_twice(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(tiny)
    for name in ("one", "two"):
        done(allocate(source, tmp_path / name, "--target-bpw", "7"))
    assert file_hashes(tmp_path / "one", "*.safetensors") == file_hashes(tmp_path / "two", "*.safetensors")


def test_the_manifest_is_an_ordinary_recipe_with_the_sensitivities_beside_it(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = source_of(tiny)
    done(allocate(source, tmp_path / "packed", "--target-bpw", "7"))
    manifest = PackedReader(tmp_path / "packed").manifest
    allocation = manifest.report["allocation"]
    assert allocation["target"] == {"goal": "target-bpw", "amount": 7}
    assert allocation["predicted_kl"] > 0
    units = allocation["units"]
    assert all(unit["sensitivity"] > 0 for unit in units.values())
    patterns = manifest.recipe["modules"]
    assert (
        patterns["model.layers.1.mlp.experts.*.up_proj"]
        == (units["layers.1.mlp.experts.*.gate_proj+up_proj"]["bits"])
    )
    recipe = tmp_path / "recipe.toml"
    lines = [f'"{pattern}" = {bits}' for pattern, bits in patterns.items()]
    recipe.write_text("\n".join(["[modules]", *lines]))
    done(allocate(source, tmp_path / "again", "--recipe", recipe))
    assert file_hashes(tmp_path / "packed", "*.safetensors") == file_hashes(tmp_path / "again", "*.safetensors")


def test_dry_run_prints_the_rates_says_that_it_measures_and_writes_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    source = source_of(tiny)
    result = allocate(source, tmp_path / "packed", "--target-bpw", "7", "--dry-run")
    output = done(result)
    assert "measuring what errors cost" in result.stderr
    for words in ("layers.1.mlp.experts.*.down_proj", "predicted KL", "total"):
        assert words in output
    assert not (tmp_path / "packed").exists()
    plan = json.loads(done(allocate(source, tmp_path / "packed", "--target-bpw", "7", "--dry-run", "--json")))
    assert plan["allocation"]["units"]
    assert plan["bits_per_weight"] <= 7


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (("--target-size", "40kB", "--bits", "2"), ("--target-size", "--bits")),
        (("--max-kl", "0.1", "--bits", "2"), ("--max-kl", "--bits")),
        (("--target-size", "40kB", "--target-bpw", "3"), ("--target-size", "--target-bpw")),
        (("--target-bpw", "3", "--max-kl", "0.1"), ("--target-bpw", "--max-kl")),
        (("--target-size", "6GiB"), ("--target-size", "6GiB", "decimal")),
        (("--target-decoder-size", "none"), ("--target-decoder-size", "'none'", "13.7MB")),
        (("--target-decoder-size", "1kB"), ("--target-decoder-size", "smallest")),
        (("--target-bpw", "0.5"), ("--target-bpw", "smallest")),
        (("--target-bpw", "inf"), ("--target-bpw", "inf", "finite")),
        (("--max-kl", "nan"), ("--max-kl", "nan", "finite")),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(
    tiny: Callable[..., Path], tmp_path: Path, options: tuple[str, ...], naming: tuple[str, ...]
) -> None:
    refused(allocate(source_of(tiny), tmp_path / "packed", *options), 2, *naming)
    assert not (tmp_path / "packed").exists()


def test_stored_hessians_are_refused_beside_a_target(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(tiny)
    (tmp_path / "hessians").mkdir()
    options = ("--hessians", tmp_path / "hessians", "--target-bpw", "3")
    refused(run("quantize", source, "--out", tmp_path / "packed", *options), 2, "--target-bpw", "--hessians")


def test_an_existing_output_is_refused_before_anything_is_measured(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "packed").mkdir()
    refused(allocate(source_of(tiny), tmp_path / "packed", "--target-bpw", "7"), 2, "--overwrite")


def test_the_output_is_named_after_the_target(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = source_of(tiny)
    done(run("quantize", source, "--text", source.parent / "words.txt", *FREE, "--target-bpw", "7"))
    assert (tmp_path / f"{source.name}-7bpw" / "ernieq.json").exists()


def test_a_divergence_is_measured_on_held_out_windows_and_held(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    result = allocate(source_of(tiny), tmp_path / "packed", "--max-kl", "0.03", "--json")
    report = json.loads(done(result))
    assert 0 < report["kl"] <= 0.03
    assert "round 1: KL " in result.stderr
    calibration = PackedReader(tmp_path / "packed").manifest.calibration
    assert calibration is not None
    assert calibration.windows == 8


def test_a_missed_divergence_is_corrected_with_more_bytes_at_most_three_times(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(run: Any, _tokens: object) -> float:
        sizes.append(run.file_bytes())
        return 0.041 if len(sizes) < 3 else found_last

    monkeypatch.setattr(allocating, "measured_divergence", measured)
    found_last = 0.029
    result = allocate(source_of(tiny), tmp_path / "held", "--max-kl", "0.03")
    done(result)
    assert len(sizes) == 3
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]
    assert "not held" not in result.stderr
    sizes.clear()
    found_last = 0.031
    result = allocate(source_of(tiny), tmp_path / "missed", "--max-kl", "0.03")
    done(result)
    assert len(sizes) == 3
    assert "--max-kl 0.03 is not held: the KL that was reached is 0.0310" in result.stderr


def test_a_text_of_one_window_is_refused_for_a_divergence(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny()
    write_words(source.parent / "words.txt", 40)
    refused(allocate(source, tmp_path / "packed", "--max-kl", "0.1"), 4, "--max-kl", "two")


def test_a_plan_counts_the_time_and_the_memory_of_measuring(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernieq.cli.preflight.estimate_time", lambda *_, **__: Estimate(0.0, 0.0))
    source = source_of(tiny)
    options = ("--dry-run", "--json", "--embedding-bits", "5", "--head-bits", "5")
    plain = json.loads(done(allocate(source, tmp_path / "packed", *options)))
    measured = json.loads(done(allocate(source, tmp_path / "packed", "--target-bpw", "7", *options)))
    assert plain["seconds"] == 0
    assert measured["seconds"] > 0
    copies, tokens = len(measured["allocation"]["units"]), 4 * 32
    width = open_checkpoint(source).config.hidden_size
    assert measured["memory_bytes"] == plain["memory_bytes"] + 2 * copies * tokens * width
