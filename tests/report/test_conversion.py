from __future__ import annotations

from typing import Any

from ernieq.report import StarvedExpert, conversion_html, conversion_markdown, layer_rows

REPORT: dict[str, Any] = {
    "seconds": 71.3,
    "proxy_errors": {
        "model.embed_tokens": 0.9,
        "model.layers.1.mlp.experts.0.gate_proj": 0.06,
        "model.layers.1.mlp.experts.1.gate_proj": 0.25,
        "model.layers.1.self_attn.o_proj": 0.02,
        "model.layers.10.self_attn.o_proj": 0.8,
        "model.layers.0.mlp.gate_proj": 0.01,
    },
    "layers": [
        {
            "index": 1,
            "output_error": 0.031,
            "expert_tokens": [812, 64, 256],
            "expert_trust": [0.76, 0.2, 0.5],
        },
        {"index": 0, "output_error": 0.01, "expert_tokens": [], "expert_trust": []},
    ],
}


def test_an_expert_is_starved_only_where_it_leans_more_on_its_layer_than_on_itself() -> None:
    assert layer_rows(REPORT)[1].starved == (StarvedExpert(expert=1, tokens=64, trust=0.2),)


def test_layers_are_sorted_and_summarised_by_their_own_matrices() -> None:
    dense, moe = layer_rows(REPORT)
    assert (dense.index, dense.modules, dense.fewest_tokens, dense.starved) == (0, 1, None, ())
    assert (moe.modules, moe.median_error, moe.worst_error) == (3, 0.06, 0.25)
    assert (moe.worst_module, moe.fewest_tokens) == ("mlp.experts.1.gate_proj", 64)


def test_markdown_flags_starved_experts_with_their_counts() -> None:
    text = conversion_markdown(REPORT)
    assert "Layer 1: starved experts" in text
    assert "1 (64 tokens, trust 0.20)" in text
    assert "0.250 (mlp.experts.1.gate_proj)" in text
    assert "1 min 11 s" in text
    assert "starved experts" not in conversion_markdown({**REPORT, "layers": REPORT["layers"][1:]})


def test_html_marks_the_row_and_escapes_names() -> None:
    page = conversion_html(REPORT, "<mini> 2 bit")
    assert page.count('<tr class="starved">') == 1
    assert "&lt;mini&gt;" in page
    assert "<mini>" not in page


def test_an_empty_report_makes_a_page_and_not_an_error() -> None:
    assert "<tbody>\n\n</tbody>" in conversion_html({}, "nothing")
    assert conversion_markdown({}).startswith("# Conversion")
