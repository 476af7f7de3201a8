"""What a conversion did, layer by layer, from the report that its manifest keeps.

The report is a mapping; every key may be missing, and unknown keys are passed over:

    {"seconds": 71.3,
     "proxy_errors": {"model.layers.1.mlp.experts.0.gate_proj": 0.061, ...},
     "layers": [{"index": 1, "output_error": 0.031, "expert_tokens": [812, 64, ...],
                 "expert_trust": [0.61, 0.11, ...]}]}

Errors are relative: squared error over squared signal, in the metric of the calibration data. The trust of an
expert is the weight of its own statistics against its layer's; one below `STARVED_TRUST` is called starved.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernieq.records import format_seconds, format_significant
from ernieq.report.table import Section, Table

_NOTHING = "-"

STARVED_TRUST = 0.5
"""Below it an expert leans more on its layer than on the tokens that it saw itself."""


@dataclass(frozen=True)
class StarvedExpert:
    """An expert that saw too few calibration tokens to be quantized by its own statistics."""

    expert: int
    tokens: int
    trust: float


@dataclass(frozen=True)
class LayerRow:
    """One layer of a conversion report.

    Args:
        index: of the decoder layer.
        modules: number of quantized matrices.
        median_error: over the matrices, relative; None if the report has none.
        worst_error: the largest of them.
        worst_module: whose it is, named within the layer.
        output_error: of the layer's output, relative; None if not measured.
        fewest_tokens: seen by any expert; None for a dense layer.
        starved: experts below `STARVED_TRUST`.
    """

    index: int
    modules: int
    median_error: float | None
    worst_error: float | None
    worst_module: str
    output_error: float | None
    fewest_tokens: int | None
    starved: tuple[StarvedExpert, ...]


def layer_rows(report: Mapping[str, Any]) -> tuple[LayerRow, ...]:
    """Read the layers of a conversion report, in the order of their indices."""
    errors = report.get("proxy_errors", {})
    layers = sorted(report.get("layers", ()), key=lambda layer: int(layer["index"]))
    return tuple(_layer_row(layer, errors) for layer in layers)


def _layer_row(layer: Mapping[str, Any], all_errors: Mapping[str, float]) -> LayerRow:
    prefix = f"model.layers.{layer['index']}."
    errors = {name.removeprefix(prefix): error for name, error in all_errors.items() if name.startswith(prefix)}
    worst = max(errors, key=lambda name: errors[name], default="")
    counts = layer.get("expert_tokens", ())
    trusts = layer.get("expert_trust", ())
    return LayerRow(
        index=layer["index"],
        modules=len(errors),
        median_error=statistics.median(errors.values()) if errors else None,
        worst_error=errors.get(worst),
        worst_module=worst,
        output_error=layer.get("output_error"),
        fewest_tokens=min(counts, default=None),
        starved=tuple(
            StarvedExpert(expert, tokens, trust)
            for expert, (tokens, trust) in enumerate(zip(counts, trusts, strict=False))
            if trust < STARVED_TRUST
        ),
    )


def conversion_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: a table of layers, and a list of starved experts if there are any."""
    rows = layer_rows(report)
    return "\n".join(["# Conversion", "", _table(report, rows).markdown(), *_warnings(rows)]).rstrip() + "\n"


def conversion_html(report: Mapping[str, Any], title: str) -> str:
    """The report as one HTML page without scripts or outside files; rows with starved experts are marked."""
    rows = layer_rows(report)
    table = _table(report, rows)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    lines = []
    for row, cells in zip(rows, table.sections[0].rows, strict=True):
        mark = ' class="starved"' if row.starved else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    body = "\n".join(lines)
    warnings = "".join(f"<p>{html.escape(line)}</p>\n" for line in _warnings(rows))
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in table.notes)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        f"{notes}{warnings}</body>\n</html>\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.25rem .75rem;text-align:right;border-bottom:1px solid #ccc}"
    "tr.starved{background:#fff1d6}"
)


def _table(report: Mapping[str, Any], rows: Sequence[LayerRow]) -> Table:
    columns = ("layer", "matrices", "median error", "worst error", "output error", "fewest tokens", "starved")
    cells = tuple(
        (
            str(row.index),
            str(row.modules),
            _error(row.median_error),
            _error(row.worst_error) + (f" ({row.worst_module})" if row.worst_module else ""),
            _error(row.output_error),
            _NOTHING if row.fewest_tokens is None else f"{row.fewest_tokens:,}",
            _NOTHING if row.fewest_tokens is None else str(len(row.starved)),
        )
        for row in rows
    )
    notes = ["Errors are relative: squared error over squared signal, in the metric of the calibration data."]
    if "seconds" in report:
        notes.append(f"The whole conversion took {format_seconds(report['seconds'])}.")
    return Table("Layers", columns, (Section("", cells),), tuple(notes))


def _warnings(rows: Sequence[LayerRow]) -> list[str]:
    """A sentence for each layer with starved experts."""
    return [
        f"Layer {row.index}: starved experts, which lean more on their layer's statistics than on their own: "
        + ", ".join(f"{one.expert} ({one.tokens:,} tokens, trust {one.trust:.2f})" for one in row.starved)
        + "."
        for row in rows
        if row.starved
    ]


def _error(value: float | None) -> str:
    return _NOTHING if value is None else format_significant(value)
