"""Every option of ``ernieq quantize`` changes what it says it changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ernieq.cli.shared import ProgressReport
from ernieq.encode import EncodeOptions, encode_matrices
from ernieq.kernels.backend import Backend
from ernieq.load import load_model
from ernieq.pack import PackedReader
from tests.cli.quantizing import CODE, SAMPLE, done, quantize, refused, run
from tests.convert.conversions import decoded_model, file_hashes, write_words


@pytest.fixture
def source(tiny: Callable[..., Path]) -> Path:
    """An untied MoE model with a dense first layer: it has every part that an option can name."""
    directory = tiny(tied=False)
    write_words(directory.parent / "words.txt")
    return directory


def bits_of(packed: Path) -> dict[str, float]:
    reader = PackedReader(packed)
    return {module: reader.code_of(module).bits_per_weight for module in reader.modules()}


def shards(packed: Path) -> dict[str, str]:
    return file_hashes(packed, "*.safetensors")


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3, 4])
def test_bits_set_the_routed_experts_and_the_code_of_all_is_in_the_manifest(
    source: Path, tmp_path: Path, bits: float
) -> None:
    done(quantize(source, tmp_path / "packed", "--bits", str(bits)))
    done(run("verify", tmp_path / "packed"))
    found = bits_of(tmp_path / "packed")
    assert {found[name] for name in found if ".experts." in name} == {bits}
    assert PackedReader(tmp_path / "packed").manifest.recipe["bits"] == bits


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--attention-bits", "self_attn."),
        ("--shared-bits", "shared_experts."),
        ("--dense-bits", "layers.0.mlp."),
        ("--embedding-bits", "embed_tokens"),
        ("--head-bits", "lm_head"),
    ],
)
@pytest.mark.parametrize("bits", [3.5, 16])
def test_an_option_of_a_part_sets_this_part_and_no_other(
    source: Path, tmp_path: Path, option: str, words: str, bits: float
) -> None:
    done(quantize(source, tmp_path / "default"))
    done(quantize(source, tmp_path / "packed", option, str(bits)))
    expected = bits_of(tmp_path / "default")
    chosen = {name for name in expected if words in name}
    assert chosen
    if bits == 16:
        expected = {name: found for name, found in expected.items() if name not in chosen}
    else:
        expected |= dict.fromkeys(chosen, bits)
    assert bits_of(tmp_path / "packed") == expected


def test_every_step_of_tuning_is_shown(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(ProgressReport, "describe", lambda _self, what: shown.append(what))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[tune]\nenabled = true\nwindow = 32\nbatch_tokens = 64\nsteps = 3\n")
    done(quantize(source, tmp_path / "tuned", "--recipe", recipe, "--windows", "12"))
    steps = [line for line in shown if line.startswith("tuning: step")]
    assert steps == [f"tuning: step {step} of 3" for step in (1, 2, 3)]


def test_tune_changes_scales_and_no_tune_leaves_them(source: Path, tmp_path: Path) -> None:
    write_words(source.parent / "words.txt", 4000)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[tune]\nenabled = true\nwindow = 32\nbatch_tokens = 256\nlearning_rate = 0.01\n")
    options = ("--windows", "100", "--attention-bits", "2", "--head-bits", "2")
    done(quantize(source, tmp_path / "default", *options))
    from_recipe = quantize(
        source, tmp_path / "tuned", "--recipe", recipe, "--tune-steps", "20", "--json", *options
    )
    tuning = json.loads(done(from_recipe))["tuning"]
    assert tuning["after"] < tuning["before"]
    assert tuning["steps"] == 20
    assert "tuning: held-out divergence" in from_recipe.stderr
    done(quantize(source, tmp_path / "not", "--recipe", recipe, "--no-tune", *options))
    assert json.loads(done(quantize(source, tmp_path / "on", "--tune", "--json", *options)))["tuning"]
    assert shards(tmp_path / "tuned") != shards(tmp_path / "default")
    assert shards(tmp_path / "not") == shards(tmp_path / "default")
    assert PackedReader(tmp_path / "tuned").manifest.recipe["tune"]["steps"] == 20
    verified = json.loads(done(run("verify", tmp_path / "tuned", "--json")))
    assert verified["tuned"] == 9  # norms and routers


def test_steps_of_tuning_without_tuning_are_refused(source: Path, tmp_path: Path) -> None:
    refused(quantize(source, tmp_path / "packed", "--tune-steps", "5"), 2, "--tune-steps", "without --tune")


def test_the_text_that_is_too_short_for_tuning_is_said_to_be(source: Path, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "packed", "--tune", "--windows", "1", "--json")
    assert "too short" in json.loads(done(result))["untuned"]
    assert "not tuned: the calibration text is too short" in result.stderr


def test_options_override_the_recipe_file_and_the_file_the_defaults(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'bits = 3\nseed = 5\n[parts]\nattention = 3\ndense_mlp = 3\n[modules]\n"*.experts.1.*" = 4\n'
        "[encode]\ndamping = 0.02\n"
    )
    done(quantize(source, tmp_path / "packed", "--recipe", recipe, "--attention-bits", "2"))
    found, manifest = bits_of(tmp_path / "packed"), PackedReader(tmp_path / "packed").manifest
    assert found["model.layers.1.self_attn.q_proj"] == 2
    assert found["model.layers.0.mlp.up_proj"] == 3
    assert found["model.layers.1.mlp.experts.0.up_proj"] == 3
    assert found["model.layers.1.mlp.experts.1.up_proj"] == 4
    assert found["model.layers.1.mlp.shared_experts.up_proj"] == 4
    assert (manifest.seed, manifest.recipe["encode"]["damping"]) == (5, 0.02)
    done(quantize(source, tmp_path / "other", "--recipe", recipe, "--bits", "2", "--seed", "6"))
    assert bits_of(tmp_path / "other")["model.layers.1.mlp.experts.0.up_proj"] == 2
    assert PackedReader(tmp_path / "other").manifest.seed == 6


def test_text_windows_and_window_choose_the_sample(source: Path, tmp_path: Path) -> None:
    done(quantize(source, tmp_path / "default"))
    other = write_words(tmp_path / "other.txt", seed=1)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"w3 w4 w{n}"}) + "\n" for n in range(5, 60)))
    found = {}
    for name, options in {
        "other": ("--text", other),
        "both": ("--text", other, "--text", lines),
        "windows": ("--windows", "3"),
        "window": ("--window", "16"),
    }.items():
        done(quantize(source, tmp_path / name, *options))
        calibration = PackedReader(tmp_path / name).manifest.calibration
        assert calibration is not None
        found[name] = (sorted(calibration.files), calibration.windows, calibration.tokens)
        assert shards(tmp_path / name) != shards(tmp_path / "default")
    assert found == {
        "other": (["other.txt"], 4, 128),
        "both": (["lines.jsonl", "other.txt"], 4, 128),
        "windows": (["words.txt"], 3, 96),
        "window": (["words.txt"], 4, 64),
    }


@pytest.mark.parametrize("options", [("--seed", "1"), ("--state-bits", "12"), ("--fast",)], ids=" ".join)
def test_seed_state_bits_and_fast_change_the_bytes(
    source: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    done(quantize(source, tmp_path / "default"))
    done(quantize(source, tmp_path / "packed", *options))
    assert shards(tmp_path / "packed") != shards(tmp_path / "default")
    manifest = PackedReader(tmp_path / "packed").manifest
    recipe: dict[str, Any] = dict(manifest.recipe)
    assert (manifest.seed, recipe["encode"]["state_bits"], recipe["encode"]["first_pass_steps"] < 256) == (
        (1, 10, False),
        (0, 12, False),
        (0, 10, True),
    )[["--seed", "--state-bits", "--fast"].index(options[0])]


@pytest.mark.parametrize("options", [("--threads", "2"), ("--backend", "scalar")], ids=" ".join)
def test_threads_and_backend_change_no_byte(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    done(quantize(source, tmp_path / "default"))
    done(quantize(source, tmp_path / "packed", *options))
    assert shards(tmp_path / "packed") == shards(tmp_path / "default")


def test_threads_and_backend_reach_the_encoder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(*arguments: Any) -> Any:
        seen.extend(argument for argument in arguments if isinstance(argument, EncodeOptions))
        return encode_matrices(*arguments)

    monkeypatch.setattr("ernieq.convert.groups.encode_matrices", watched)
    done(quantize(source, tmp_path / "packed", "--threads", "2", "--backend", "scalar"))
    assert {(options.threads, options.backend) for options in seen} == {(2, Backend.SCALAR)}


def test_the_reference_backend_writes_the_same_bytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny(moe=False, layers=1, hidden=16, intermediate=16, heads=1, kv_heads=1, vocabulary=64)
    write_words(source.parent / "words.txt")
    for backend in ("auto", "reference"):
        done(quantize(source, tmp_path / backend, "--backend", backend))
    assert shards(tmp_path / "auto") == shards(tmp_path / "reference")


def test_stored_hessians_take_the_place_of_texts(source: Path, tmp_path: Path) -> None:
    hessians = tmp_path / "hessians"
    text = ("--text", source.parent / "words.txt")
    sample = ("--windows", "4", "--window", "32", "--threads", "1", "--device", "cpu")
    done(run("calibrate", source, "--out", hessians, *text, *sample))
    done(quantize(source, tmp_path / "along"))
    done(quantize(source, tmp_path / "stored", "--hessians", hessians))
    along, stored = PackedReader(tmp_path / "along"), PackedReader(tmp_path / "stored")
    assert along.modules() == stored.modules()
    sample_of = stored.manifest.calibration
    assert sample_of is not None
    assert along.manifest.calibration == dataclasses.replace(sample_of, hessians=None)
    assert shards(tmp_path / "along") != shards(tmp_path / "stored")  # no correction of earlier layers
    done(run("verify", tmp_path / "stored"))


@pytest.mark.parametrize("option", [("--text", "words.txt"), ("--windows", "2"), ("--window", "32")])
def test_a_sample_beside_stored_hessians_is_refused(
    source: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    (tmp_path / "hessians").mkdir()
    result = run("quantize", source, "--out", tmp_path / "packed", "--hessians", tmp_path / "hessians", *option)
    refused(result, 2, "--hessians")


def test_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = file_hashes(tmp_path)
    output = done(quantize(source, tmp_path / "packed", "--dry-run"))
    for words in (
        "routed_experts",
        "attention",
        "embedding",
        "kept",
        "total",
        "memory about",
        "disk",
        "time about",
    ):
        assert words in output
    plan = json.loads(done(quantize(source, tmp_path / "packed", "--dry-run", "--json")))
    assert file_hashes(tmp_path) == before
    assert not (tmp_path / "packed").exists()
    done(quantize(source, tmp_path / "packed"))
    assert plan["modules"] == bits_of(tmp_path / "packed")
    parameters = sum(part["parameters"] for part in plan["parts"])
    assert plan["parameters"] == parameters
    assert plan["memory_bytes"] > plan["output_bytes"] > 0
    assert plan["seconds"] > 0


def test_dry_run_refuses_what_the_run_would_refuse(source: Path) -> None:
    refused(quantize(source, source / "packed", "--dry-run"), 2, "input")


def test_an_existing_output_is_replaced_with_overwrite_alone(source: Path, tmp_path: Path) -> None:
    done(quantize(source, tmp_path / "packed"))
    before = shards(tmp_path / "packed")
    refused(quantize(source, tmp_path / "packed", "--seed", "1"), 2, "--overwrite", str(tmp_path / "packed"))
    assert shards(tmp_path / "packed") == before
    done(quantize(source, tmp_path / "packed", "--seed", "1", "--overwrite"))
    assert shards(tmp_path / "packed") != before
    done(run("verify", tmp_path / "packed"))


def test_json_reports_the_layers_and_the_size(source: Path, tmp_path: Path) -> None:
    found = json.loads(done(quantize(source, tmp_path / "packed", "--json")))
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert [layer["index"] for layer in found["layers"]] == [0, 1, 2]
    assert found["calibration_tokens"] == 128


def test_the_output_is_named_after_the_model_and_its_bits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done(run("quantize", source, "--bits", "3", "--text", source.parent / "words.txt", *CODE, *SAMPLE))
    assert (tmp_path / f"{source.name}-3bit" / "ernieq.json").exists()
    done(run("quantize", source, "--bits", "2.5", "--text", source.parent / "words.txt", *CODE, *SAMPLE))
    assert (tmp_path / f"{source.name}-2.5bit" / "ernieq.json").exists()


def test_a_half_rate_is_written_as_one_in_the_plan_the_files_and_the_card(source: Path, tmp_path: Path) -> None:
    options = ("--bits", "2.5", "--attention-bits", "4.0")
    plan = done(quantize(source, tmp_path / "packed", *options, "--dry-run"))
    assert "2.50" in next(line for line in plan.splitlines() if "routed_experts" in line)
    done(quantize(source, tmp_path / "packed", *options))
    config = (tmp_path / "packed" / "config.json").read_text()
    modules = json.loads(config)["quantization_config"]["modules"]
    assert {repr(entry["bits"]) for entry in modules.values()} == {"2.5", "4", "5"}
    recipe = PackedReader(tmp_path / "packed").manifest.recipe
    assert (repr(recipe["bits"]), repr(recipe["parts"]["attention"])) == ("2.5", "4")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "| routed experts |" in card
    assert "| 2.50 |" in card
    assert '"bits": 2.5' in card
    assert "K=2.5 L=10" in done(run("inspect", tmp_path / "packed"))


def test_a_model_of_one_and_a_half_bits_loads_and_writes(source: Path, tmp_path: Path) -> None:
    done(quantize(source, tmp_path / "packed", "--bits", "1.5", "--shared-bits", "2.5"))
    tokens = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        logits = load_model(tmp_path / "packed")(tokens)
        expected = decoded_model(source, tmp_path / "packed")(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_a_revision_of_a_local_directory_is_refused(source: Path, tmp_path: Path) -> None:
    refused(quantize(source, tmp_path / "packed", "--revision", "main"), 2, "main", source.name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_auto_says_in_one_line_which_device_it_took(source: Path, tmp_path: Path) -> None:
    auto = quantize(source, tmp_path / "auto", "--device", "auto")
    named = quantize(source, tmp_path / "named")
    assert (auto.exit_code, named.exit_code) == (0, 0)
    assert auto.stderr.count("Running on the CPU") == 1
    assert "Running on" not in named.stderr
    assert shards(tmp_path / "auto") == shards(tmp_path / "named")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    refused(quantize(source, tmp_path / "packed", "--device", "cuda"), 7, "cuda", "--device cpu")
    refused(quantize(source, tmp_path / "packed", "--device", "tpu"), 2, "tpu")
    assert not (tmp_path / "packed").exists()


def test_a_bound_of_gpu_memory_means_nothing_on_the_cpu(source: Path, tmp_path: Path) -> None:
    refused(quantize(source, tmp_path / "packed", "--vram", "8"), 2, "--vram")
