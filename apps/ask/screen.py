"""Answers on a terminal: whole, and side by side where they are compared."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..batch.stage import Column, Row, Stage
from .switches import Switches

__all__ = ["Answers"]


class Answers:
    """Shows each row as a picture's name and what was said of it.

    Args:
        switches: Under which it was asked.
        console: Where; standard output by default.
    """

    def __init__(self, switches: Switches, console: Console | None = None) -> None:
        self._names = ", ".join(switches.names)
        self._console = console or Console(highlight=False)

    def begin(self, stage: Stage, columns: tuple[Column, ...]) -> None:
        """Names the model."""
        under = f" under {self._names}" if self._names else ""
        self._console.print(Text(f"{stage.network.label}{under}", style="dim"))

    def show(self, rows: list[Row]) -> None:
        """Prints rows."""
        for row in rows:
            self._console.print(Text(f"{row['path']}: {row['question'] or ''}", style="bold"))
            self._console.print(Padding(self._said(row), (0, 0, 0, 2)))

    def _said(self, row: Row) -> RenderableType:
        if row["status"] != "ok":
            return Text(row["error"], style="red")
        if "plain_answer" in row:
            return self._compared(row)
        tokens = f"{row['kept_tokens']} of {row['image_tokens']} image tokens kept"
        fewer = f"\n({tokens})" if row["kept_tokens"] != row["image_tokens"] else ""
        drawn = f"\n→ {row['attention']}" if row.get("attention") else ""
        return Text.assemble(row["answer"], (f"{fewer}{drawn}", "dim"))

    def _compared(self, row: Row) -> RenderableType:
        table = Table(box=None, padding=(0, 3, 0, 0))
        for name in ("", "plain", self._names):
            table.add_column(name)
        table.add_row("answer", Text(row["plain_answer"]), Text(row["answer"]))
        table.add_row("image tokens", str(row["image_tokens"]), str(row["kept_tokens"]))
        table.add_row("first token after", f"{row['plain_prefill_ms']:.1f} ms", f"{row['prefill_ms']:.1f} ms")
        if row.get("attention"):
            table.add_row("attention", Text(f"→ {row['attention']}"))
        return table
