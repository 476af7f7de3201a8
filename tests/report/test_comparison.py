from __future__ import annotations

import dataclasses

import pytest

from ernieq.records import EvaluationRecord, WeightsRecord
from ernieq.report import comparison_table


def test_the_table_holds_quality_size_bits_and_time_of_both_models(
    record: EvaluationRecord, weights: WeightsRecord, base_weights: WeightsRecord
) -> None:
    table = comparison_table(
        [record],
        weights,
        name="mini-2bit",
        base_name="mini",
        base_weights=base_weights,
        times={"evaluation": 65},
    )
    rows = {row[0]: row[1:] for section in table.sections for row in section.rows}
    assert table.columns == ("", "mini", "mini-2bit")
    assert rows["perplexity"] == ("89.97 ± 1.80", "91.23 ± 1.82")
    assert rows["perplexity ratio"][1] == "1.0140 [1.01 to 1.02]"
    assert rows["KL, nats per token"][1] == "0.136 [0.131 to 0.141]"
    assert rows["top-1 agreement"][1] == "77.8%"
    assert rows["experts kept, mean of layers"][1] == "94.0%"
    assert rows["weight files"] == ("102 MB (101,900,000 B)", "36.8 MB (36,800,000 B)")
    assert rows["bits per weight, all parameters"] == ("16.02", "5.78")
    assert rows["bits per weight, quantized ones"] == ("-", "2.10")
    assert rows["evaluation"][1] == "1 min 05 s"


def test_the_protocol_stands_above_the_numbers_of_each_text(
    record: EvaluationRecord, weights: WeightsRecord
) -> None:
    other = dataclasses.replace(
        record, text=dataclasses.replace(record.text, name="books", protocol="llama.cpp", window=512)
    )
    titles = [section.title for section in comparison_table([record, other], weights, name="m").sections]
    assert titles[0] == "wikitext2: protocol gptq, 48 windows of 1024, 49,104 tokens scored"
    assert titles[1].startswith("books: protocol llama.cpp, 48 windows of 512")


def test_without_a_base_there_is_one_column_and_no_divergence(
    record: EvaluationRecord, weights: WeightsRecord
) -> None:
    alone = dataclasses.replace(record, base=None, divergence=None, routing=())
    table = comparison_table([alone], weights, name="m")
    assert table.columns == ("", "m")
    assert "KL" not in table.markdown()


def test_an_error_from_single_tokens_is_marked(record: EvaluationRecord, weights: WeightsRecord) -> None:
    single = dataclasses.replace(record, perplexity=dataclasses.replace(record.perplexity, window_error=None))
    text = comparison_table([single], weights, name="m").markdown()
    assert "91.23 ± 0.91*" in text


@pytest.mark.parametrize("value", [1e9, 123456.0])
def test_a_ruined_model_still_fits_the_table(
    record: EvaluationRecord, weights: WeightsRecord, value: float
) -> None:
    bad = dataclasses.replace(record, perplexity=dataclasses.replace(record.perplexity, perplexity=value))
    cell = comparison_table([bad], weights, name="m").sections[0].rows[0][1]
    assert len(cell) < 20


def test_a_noise_floor_stands_in_the_column_of_the_base(
    record: EvaluationRecord, weights: WeightsRecord
) -> None:
    assert record.divergence is not None
    noise = dataclasses.replace(record.divergence, mean_kl=0.0008, kl_interval=None)
    table = comparison_table([dataclasses.replace(record, noise=noise)], weights, name="m", base_name="b")
    rows = {row[0]: row[1:] for section in table.sections for row in section.rows}
    assert rows["KL, nats per token"] == ("0.000800", "0.136 [0.131 to 0.141]")
    assert rows["KL over the noise floor"][1] == "170 times"
    assert "what is no larger is noise" in table.markdown()
    assert "noise" not in comparison_table([record], weights, name="m", base_name="b").markdown()
