"""Recipes: defaults, files, overrides, refusals."""

from pathlib import Path

import pytest

from ernieq.convert import KEEP, Part, apply_overrides, default_recipe, read_recipe
from ernieq.errors import RecipeError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_sets_the_routed_experts(bits: int) -> None:
    recipe = default_recipe(bits)
    assert recipe.bits_of("model.layers.1.mlp.experts.0.up_proj", Part.ROUTED_EXPERTS) == bits
    assert recipe.bits_of("model.layers.1.self_attn.q_proj", Part.ATTENTION) == 4


def test_other_bits_have_no_default_recipe() -> None:
    with pytest.raises(RecipeError, match="--bits is 5"):
        default_recipe(5)


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
        ("[parts]\nattention = 9\n", "is 9; bits are 2 to 6, or 16"),
        ("[parts]\nattention = true\n", "bits are 2 to 6"),
        ('[modules]\n"a" = 1\n', "bits are 2 to 6"),
        ("[encode]\nspeed = 1\n", "unknown key 'speed'"),
        ("[encode]\ndamping = -1.0\n", "must be a positive float"),
        ("[calibration]\nwindows = 0\n", "must be a positive int"),
        ("tiles = 1\n", "unknown key 'tiles'"),
        ("= 3", "is not TOML"),
    ],
)
def test_what_means_nothing_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(write(tmp_path, text), 2)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml can't be read"):
        read_recipe(tmp_path / "none.toml", 2)
