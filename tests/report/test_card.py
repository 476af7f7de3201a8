from __future__ import annotations

from typing import Any

import pytest

from ernieq.records import EvaluationRecord
from ernieq.report import model_card


@pytest.fixture
def facts(record: EvaluationRecord) -> dict[str, Any]:
    return {
        "name": "ernie-21b-2bit",
        "base": "baidu/ERNIE-4.5-21B-A3B-Base-PT",
        "recipe": {"bits": 2, "seed": 7},
        "parts": [
            {"part": "routed_experts", "parameters": 20_384_000_000, "bits": 2.02, "bytes": 5_147_000_000},
            {"part": "attention", "parameters": 440_000_000, "bits": 4.03, "bytes": 221_650_000},
        ],
        "output_bytes": 5_400_000_000,
        "bits_per_weight": 2.07,
        "licence": "apache-2.0",
        "evaluations": (record,),
    }


def test_the_card_says_how_to_load_and_why_the_import_is_needed(facts: dict[str, Any]) -> None:
    card = model_card(**facts)
    assert card.index("import ernieq") < card.index("from transformers import AutoModelForCausalLM")
    assert 'AutoModelForCausalLM.from_pretrained("ernie-21b-2bit")' in card
    assert 'ernieq.load_model("ernie-21b-2bit")' in card
    assert "weights at random" in card


def test_the_card_states_sizes_and_bits_of_every_part_and_of_all(facts: dict[str, Any]) -> None:
    card = model_card(**facts)
    for row in (
        "| routed experts | 20.4 B | 2.02 | 5.15 GB |",
        "| attention | 440 M | 4.03 | 222 MB |",
        "| **all** | 20.8 B | 2.07 | 5.40 GB |",
    ):
        assert row in card


def test_every_quality_figure_stands_beside_its_protocol(facts: dict[str, Any]) -> None:
    line = next(line for line in model_card(**facts).splitlines() if "0.136" in line)
    assert "protocol gptq, 48 windows of 1024" in line
    assert "1.0140" in line


def test_a_card_without_measurements_claims_no_quality(facts: dict[str, Any]) -> None:
    assert "Quality" not in model_card(**{**facts, "evaluations": ()})


@pytest.mark.parametrize("local", ["/data/models/ernie", "bundled:ernieq-nano", "./mini", "mini"])
def test_only_a_hub_id_becomes_the_base_model_of_the_metadata(facts: dict[str, Any], local: str) -> None:
    assert "base_model: baidu/ERNIE-4.5-21B-A3B-Base-PT\n" in model_card(**facts)
    assert "base_model:" not in model_card(**{**facts, "base": local})


def test_an_unknown_licence_is_not_made_up(facts: dict[str, Any]) -> None:
    card = model_card(**{**facts, "licence": None})
    assert "license:" not in card
    assert "The weights keep the licence of the base model; see there." in card


def test_the_recipe_is_given_in_full(facts: dict[str, Any]) -> None:
    assert '"seed": 7' in model_card(**facts)
