"""A table as data, and its two printed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Rows under a common heading.

    Args:
        title: stands above the rows; may be empty.
        rows: each with as many cells as the table has columns.
    """

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows, the others hold figures.

    Args:
        title: stands above it.
        columns: headings.
        sections: groups of rows.
        notes: sentences below it.
    """

    title: str
    columns: Row
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for section in self.sections:
            for row in section.rows:
                assert len(row) == len(self.columns), f"row {row} does not fit columns {self.columns}"

    def markdown(self) -> str:
        """The table in Markdown, with its title in bold and its notes as a list."""
        lines = [f"**{self.title}**", "", _markdown_row(self.columns)]
        lines.append("|" + "|".join([" --- "] + [" ---: "] * (len(self.columns) - 1)) + "|")
        for section in self.sections:
            if section.title:
                lines.append(_markdown_row((f"**{section.title}**", *[""] * (len(self.columns) - 1))))
            lines.extend(_markdown_row(row) for row in section.rows)
        if self.notes:
            lines.extend(["", *(f"* {note}" for note in self.notes)])
        return "\n".join(lines) + "\n"

    def rich(self) -> Group:
        """The table for a terminal; columns are as wide as their widest cell, in all sections alike."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        rows = [self.columns, *(row for section in self.sections for row in section.rows)]
        widths = [max(len(row[index]) for row in rows) for index in range(len(self.columns))]
        blocks: list[RichTable | Text] = [Text(self.title, style="bold")]
        for position, section in enumerate(self.sections):
            table = RichTable(box=SIMPLE_HEAD, show_header=position == 0, pad_edge=False)
            for index, (column, width) in enumerate(zip(self.columns, widths, strict=True)):
                table.add_column(Text(column), min_width=width, justify="left" if index == 0 else "right")
            for row in section.rows:
                table.add_row(*(Text(cell) for cell in row))
            if section.title:
                blocks.append(Text(section.title, style="bold"))
            blocks.append(table)
        return Group(*blocks, *(Text(note) for note in self.notes))


def _markdown_row(cells: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
