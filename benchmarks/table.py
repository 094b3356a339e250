"""A table of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|" + "---|" * len(self.headers)
        body = [line(self.headers), rule, *(line(row) for row in self.rows)]
        return "\n".join([f"### {self.title}", "", *body, "", *(f"{note}\n" for note in self.notes)])

    def rich(self) -> RichTable:
        notes = "\n".join(self.notes) or None
        table = RichTable(
            title=self.title, caption=notes, title_justify="left", caption_justify="left", box=SIMPLE_HEAD
        )
        for header in self.headers:
            table.add_column(header, overflow="fold", min_width=6)
        for row in self.rows:
            style = "bold red" if any("FAILED" in cell or "wrong:" in cell for cell in row) else None
            table.add_row(*row, style=style)
        return table
