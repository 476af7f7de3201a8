"""What an evaluation found: the base beside the measured model, with the protocol of every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from ernieq.records import (
    DivergenceRecord,
    EvaluationRecord,
    Interval,
    PerplexityRecord,
    WeightsRecord,
    format_bits,
    format_bytes,
    format_seconds,
    format_significant,
)
from ernieq.report.table import Row, Section, Table

_NOTE_ERRORS = "± is one standard error, from the spread of window means (* of single tokens: only one window)."
_NOTE_INTERVALS = "Brackets are 95% intervals by bootstrap over windows; KL is KL(base || model)."
_NOTE_NOISE = "The base's own KL is that of bfloat16 arithmetic against float32: what is no larger is noise."
_NOTHING = "-"


def comparison_table(
    records: Sequence[EvaluationRecord],
    weights: WeightsRecord,
    *,
    name: str,
    base_name: str | None = None,
    base_weights: WeightsRecord | None = None,
    times: Mapping[str, float] | None = None,
) -> Table:
    """Build the table that ends a measurement: quality, size, time.

    Args:
        records: one per text.
        weights: of the measured model.
        name: heading of the measured model's column.
        base_name: heading of the base's column; without it the table has a single column of figures.
        base_weights: of the base, if known.
        times: what took how many seconds.
    """
    with_base = base_name is not None
    sections = [_text_section(record, with_base) for record in records]
    sections.append(Section("size", _size_rows(weights, base_weights, with_base)))
    if times:
        rows = tuple(_row(what, format_seconds(seconds), "", with_base) for what, seconds in times.items())
        sections.append(Section("time", rows))
    columns = ("", base_name, name) if base_name is not None else ("", name)
    notes = (_NOTE_ERRORS, _NOTE_INTERVALS) if with_base else (_NOTE_ERRORS,)
    if any(record.noise is not None for record in records):
        notes = (*notes, _NOTE_NOISE)
    return Table("Evaluation", columns, tuple(sections), notes)


def protocol_line(record: EvaluationRecord) -> str:
    """Which text was measured, and how: what must stand beside any of its numbers."""
    text = record.text
    return (
        f"{PurePath(text.name).name}: protocol {text.protocol}, {text.windows} windows of {text.window}, "
        f"{text.scored_tokens:,} tokens scored"
    )


def _row(label: str, measured: str, base: str, with_base: bool) -> Row:
    return (label, base, measured) if with_base else (label, measured)


def _text_section(record: EvaluationRecord, with_base: bool) -> Section:
    base = record.base
    rows = [
        _row("perplexity", _perplexity(record.perplexity), _perplexity(base), with_base),
        _row("bits per byte", _bits_per_byte(record.perplexity), _bits_per_byte(base), with_base),
    ]
    if record.divergence is not None:
        figures = _divergence_rows(record.divergence)
        floor = dict(_divergence_rows(record.noise)) if record.noise is not None else {}
        rows.extend(_row(label, figure, floor.get(label, ""), with_base) for label, figure in figures)
        if record.noise is not None and record.noise.mean_kl > 0:
            times = record.divergence.mean_kl / record.noise.mean_kl
            rows.append(_row("KL over the noise floor", f"{format_significant(times)} times", "", with_base))
    if record.routing:
        kept = sum(layer.experts_kept for layer in record.routing) / len(record.routing)
        rows.append(_row("experts kept, mean of layers", f"{kept:.1%}", "", with_base))
    return Section(protocol_line(record), tuple(rows))


def _divergence_rows(divergence: DivergenceRecord) -> list[tuple[str, str]]:
    return [
        ("perplexity ratio", f"{divergence.perplexity_ratio:.4f}{_bracket(divergence.ratio_interval)}"),
        ("KL, nats per token", format_significant(divergence.mean_kl) + _bracket(divergence.kl_interval)),
        ("KL, median", format_significant(divergence.median_kl)),
        ("KL, 99th percentile", format_significant(divergence.p99_kl)),
        ("KL, largest", format_significant(divergence.max_kl)),
        ("top-1 agreement", f"{divergence.top1_agreement:.1%}"),
    ]


def _size_rows(weights: WeightsRecord, base: WeightsRecord | None, with_base: bool) -> tuple[Row, ...]:
    def cells(record: WeightsRecord) -> tuple[str, ...]:
        return (
            f"{format_bytes(record.file_bytes)} ({record.file_bytes:,} B)",
            format_bytes(record.decoder_bytes),
            format_bits(record.bits),
            format_bits(record.quantized_bits),
        )

    labels = (
        "weight files",
        "decoder (no embedding, no head)",
        "bits per weight, all parameters",
        "bits per weight, quantized ones",
    )
    base_cells = (_NOTHING,) * len(labels) if base is None else cells(base)
    rows = zip(labels, cells(weights), base_cells, strict=True)
    return tuple(_row(label, measured, base_cell, with_base) for label, measured, base_cell in rows)


def _perplexity(record: PerplexityRecord | None) -> str:
    if record is None:
        return _NOTHING
    error, mark = record.window_error, ""
    if error is None:
        error, mark = record.token_error, "*"
    return f"{_two_decimals(record.perplexity)} ± {_two_decimals(error)}{mark}"


def _bits_per_byte(record: PerplexityRecord | None) -> str:
    return _NOTHING if record is None or record.bits_per_byte is None else f"{record.bits_per_byte:.4f}"


def _two_decimals(value: float) -> str:
    return f"{value:,.2f}" if value < 1e7 else f"{value:.2e}"


def _bracket(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval}]"
