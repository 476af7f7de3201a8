"""Recipes: defaults, files, overrides, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest

from ernieq.convert import KEEP, Part, apply_overrides, default_recipe, read_recipe
from ernieq.errors import RecipeError
from ernieq.trellis import RATES


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("bits", [bits for bits in RATES if bits <= 6])
def test_bits_sets_the_routed_experts_and_no_part_that_all_tokens_meet_gets_less_than_them_or_three(
    bits: float,
) -> None:
    recipe = default_recipe(bits)
    assert recipe.bits == bits
    assert recipe.bits_of("model.layers.1.mlp.experts.0.up_proj", Part.ROUTED_EXPERTS) == bits
    assert all(recipe.parts[part] >= max(bits, 3) for part in set(Part) - {Part.ROUTED_EXPERTS})
    assert set(recipe.parts.values()) <= set(RATES)


def test_attention_of_the_whole_rates_has_four_bits() -> None:
    for bits in (2, 3, 4):
        assert default_recipe(bits).bits_of("model.layers.1.self_attn.q_proj", Part.ATTENTION) == 4


@pytest.mark.parametrize("bits", [7, 1, 2.25, 6.5, math.nan, True, "2", [2], None])
def test_other_bits_have_no_default_recipe(bits: Any) -> None:
    with pytest.raises(RecipeError, match=r"--bits is .* default recipes for 1\.5 to 6 bits in halves"):
        default_recipe(bits)


def test_a_file_may_give_halves_and_a_whole_number_is_kept_as_one(tmp_path: Path) -> None:
    text = 'bits = 2.5\n[parts]\nattention = 4.0\nembedding = 8\n[modules]\n"*.q_proj" = 3.5\n'
    recipe = read_recipe(write(tmp_path, text), None)
    assert recipe.to_dict()["bits"] == recipe.parts[Part.ROUTED_EXPERTS] == 2.5
    assert repr(recipe.to_dict()["parts"]["attention"]) == "4"
    assert recipe.parts[Part.EMBEDDING] == 8
    assert recipe.bits_of("model.layers.0.self_attn.q_proj", Part.ATTENTION) == 3.5
    assert repr(default_recipe(2.0).to_dict()) == repr(default_recipe(2).to_dict())


def test_a_file_overrides_parts_modules_and_settings(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'bits = 3\nseed = 7\n[parts]\nattention = 16\n[modules]\n"model.layers.0.*" = 5\n"*.q_proj" = 6\n'
        "[encode]\ndamping = 0.02\n[calibration]\nwindows = 9\n",
    )
    recipe = read_recipe(path, None)
    assert recipe.bits == 3
    assert recipe.seed == 7
    assert recipe.bits_of("model.layers.1.self_attn.k_proj", Part.ATTENTION) == KEEP
    assert recipe.bits_of("model.layers.0.self_attn.k_proj", Part.ATTENTION) == 5
    assert recipe.bits_of("model.layers.0.self_attn.q_proj", Part.ATTENTION) == 6
    assert recipe.encode.damping == 0.02
    assert recipe.calibration.windows == 9
    assert read_recipe(path, 2).bits == 2


def test_a_recipe_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    recipe = apply_overrides(default_recipe(2), {"seed": 3, "modules": {"*.o_proj": 5}}, "test")
    assert apply_overrides(default_recipe(2), recipe.to_dict(), "test") == recipe


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[parts]\nrouter = 4\n", "router is never quantized"),
        ("[parts]\nnorms = 4\n", "norms is never quantized"),
        ("[parts]\nwheels = 4\n", "unknown part 'wheels'"),
        ("[parts]\nattention = 9\n", "is 9; bits are 1.5 to 6 in halves, 7, 8, or 16 to keep the source"),
        ("[parts]\nattention = 2.25\n", "is 2.25; bits are 1.5 to 6 in halves"),
        ("[parts]\nattention = nan\n", "is nan; bits are 1.5 to 6 in halves"),
        ('[parts]\nattention = "4"\n', "is '4'; bits are 1.5 to 6 in halves"),
        ("bits = [2]\n", r"--bits is \[2\]"),
        ("[parts]\nattention = true\n", "bits are 1.5 to 6"),
        ('[modules]\n"a" = 1\n', "bits are 1.5 to 6"),
        ("[encode]\nspeed = 1\n", "unknown key 'speed'"),
        ("[encode]\ndamping = -1.0\n", "must be a positive float"),
        ("[calibration]\nwindows = 0\n", "must be a positive int"),
        ("tiles = 1\n", "unknown key 'tiles'"),
        ("= 3", "is not TOML"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(write(tmp_path, text), None if text.startswith("bits") else 2)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml can't be read"):
        read_recipe(tmp_path / "none.toml", 2)
