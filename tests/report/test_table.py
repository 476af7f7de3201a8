from __future__ import annotations

import io

from rich.console import Console

from ernieq.report import Section, Table

TABLE = Table(
    "Title",
    ("", "base", "2 bit"),
    (Section("a section whose title is longer than any cell", (("x|y", "1", "[2]"),)), Section("b", ())),
    ("A note.",),
)


def test_markdown_has_a_cell_for_every_column_and_escapes_bars() -> None:
    rows = [line for line in TABLE.markdown().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {4}
    assert "| x\\|y | 1 | [2] |" in rows


def test_a_terminal_shows_every_cell_and_note_as_it_is() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(TABLE.rich())
    for piece in ("Title", "a section whose title is longer than any cell", "x|y", "[2]", "2 bit", "A note."):
        assert piece in out.getvalue()


def test_columns_stand_at_the_same_place_in_all_sections() -> None:
    table = Table(
        "t", ("", "value"), (Section("s", (("a", "1"),)), Section("u", (("long label", "22222222"),)))
    )
    out = io.StringIO()
    Console(file=out, width=80).print(table.rich())
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    ends = {len(line) for line in lines if line.endswith(("value", " 1", "22222222"))}
    assert len(ends) == 1
