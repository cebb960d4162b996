"""What a command tells a person: progress and notes on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .batch.job import Summary
    from .batch.shards import Merged
    from .batch.stage import Column, Row, Stage
    from .catalog import ModelFacts

__all__ = [
    "FetchBar",
    "RowTable",
    "RowText",
    "RunReport",
    "StepBar",
    "print_checkpoints",
    "print_merged",
    "print_models",
    "print_summary",
    "stderr",
]

stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Inputs a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} images/s", style="progress.data.speed")


class RunReport:
    """Notes, and a bar with rate and remaining time while stderr is a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        self._counting = threading.Event()

    def note(self, message: str) -> None:
        """One line on stderr."""
        stderr.print(message, markup=False)

    def start(self, inputs: Iterable[object], done: int) -> None:
        """Shows the bar and starts to count the inputs beside the work."""
        if not stderr.is_terminal:
            return
        self._progress = Progress(
            SpinnerColumn(), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(), console=stderr
        )
        self._task = self._progress.add_task("", total=None, completed=done)
        self._progress.start()
        self._counting.set()
        threading.Thread(target=self._count, args=(inputs,), daemon=True).start()

    def advance(self, count: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.advance(self._task, count)

    def stop(self) -> None:
        """Takes the bar away."""
        self._counting.clear()
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _count(self, inputs: Iterable[object]) -> None:
        """Finds the total by listing once more; on a slow disk the bar stays without an end for a while."""
        total = 0
        for _ in inputs:
            total += 1
            if not self._counting.is_set():
                return
        if self._progress is not None:
            self._progress.update(self._task, total=total)


class RowTable:
    """Rows as a table on a terminal, batch by batch, so that no row waits for the last one."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._stage: Stage | None = None

    def begin(self, stage: Stage, columns: tuple[Column, ...]) -> None:
        """Prints the header."""
        self._stage = stage
        self._print([("[bold]image[/bold]", f"[bold]{stage.network.label}[/bold]")])

    def show(self, rows: list[Row]) -> None:
        """Prints one line a row."""
        assert self._stage is not None
        from rich.markup import escape

        lines = []
        for row in rows:
            if row["status"] == "ok":
                lines.append((escape(row["path"]), escape(self._stage.describe(row))))
            else:
                lines.append((escape(row["path"]), f"[red]{escape(row['error'])}[/red]"))
        self._print(lines)

    def _print(self, lines: list[tuple[str, str]]) -> None:
        width = self._console.width
        table = Table.grid(padding=(0, 2))
        table.add_column(width=max(12, width * 2 // 5), overflow="ellipsis", no_wrap=True)
        table.add_column(width=max(12, width - width * 2 // 5 - 4), overflow="ellipsis", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        self._console.print(table)


class RowText:
    """Rows as CSV or JSON lines on a stream."""

    def __init__(self, stream: IO[str], form: str) -> None:
        self._stream = stream
        self._form = form
        self._columns: tuple[Column, ...] = ()
        self._write: Callable[[list[Row]], None] | None = None

    def begin(self, stage: Stage, columns: tuple[Column, ...]) -> None:
        """Takes note of the columns; nothing is written before there are rows, since the engine may refuse yet."""
        self._columns = columns

    def show(self, rows: list[Row]) -> None:
        """Writes the rows, after the header if the form has one, and flushes."""
        if self._write is None:
            from .batch.sinks import stdout_writer

            self._write = stdout_writer(self._stream, self._columns, self._form)
        self._write(rows)


def print_summary(summary: Summary, as_json: bool) -> None:
    """Says on stderr what came of a run, in one line; with `as_json` and an output file, as an object on stdout too."""
    ok = summary.rows - summary.failed
    rate = f", {summary.rate:,.1f} images/s" if summary.computed else ""
    where = f" → {summary.output}" if summary.output else ""
    style = "yellow" if summary.failed else "green"
    stderr.print(Text(f"{ok:,} ok, {summary.failed:,} failed{rate}{where}", style=style))
    if as_json and summary.output:
        facts = {
            "output": summary.output,
            "rows": summary.rows,
            "ok": ok,
            "failed": summary.failed,
            "computed": summary.computed,
            "seconds": round(summary.seconds, 3),
            "images_per_second": round(summary.rate, 3),
        }
        print(json.dumps(facts), file=sys.stdout)


def print_merged(output: str, merged: Merged, as_json: bool) -> None:
    """Says on stderr what came of putting shards together; with `as_json` as an object on stdout, too."""
    ok = merged.rows - merged.failed
    style = "yellow" if merged.failed else "green"
    stderr.print(Text(f"{ok:,} ok, {merged.failed:,} failed of {len(merged.parts):,} shards → {output}", style=style))
    if as_json:
        facts = {"output": output, "rows": merged.rows, "ok": ok, "failed": merged.failed, "parts": [*merged.parts]}
        print(json.dumps(facts), file=sys.stdout)


def print_models(facts: list[ModelFacts], as_json: bool) -> None:
    """The list of models on stdout."""
    if as_json:
        print(json.dumps([fact.as_dict() for fact in facts], indent=1))
        return
    table = _table("name", "family", "params (M)", "GMACs", "top-1", "weights")
    for fact in facts:
        numbers = ("" if value is None else f"{value:g}" for value in (fact.params, fact.gmacs, fact.top1))
        table.add_row(fact.name, fact.family, *numbers, _where(fact.source, fact.here))
    _print_wide(table)


def print_checkpoints(facts: list[dict[str, object]], as_json: bool) -> None:
    """The list of checkpoints on stdout."""
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = _table("name", "family", "top-1", "licence", "sha256", "weights")
    for fact in facts:
        pinned = "pinned" if fact["pinned"] else "not pinned"
        top1 = "" if fact["top1"] is None else f"{fact['top1']:g}"
        where = str(fact["path"] or fact["source"])
        state = _where(where, fact["path"] is not None)
        table.add_row(str(fact["name"]), str(fact["family"]), top1, str(fact["license"]), pinned, state)
    _print_wide(table)


def _where(source: str | None, here: bool) -> str:
    if source is None:
        return "none published"
    return f"here ({source})" if here else source


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in headers:
        is_number = header in ("params (M)", "GMACs", "top-1")
        table.add_column(header, justify="right" if is_number else "left", no_wrap=True, overflow="ellipsis")
    return table


def _print_wide(table: Table) -> None:
    """A table as wide as the terminal, or as itself where nobody reads it on one."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000
    console.print(table, crop=False)


class FetchBar:
    """A download bar on stderr while it is a terminal, else one line when it begins."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: Any = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=stderr,
            disable=not stderr.is_terminal,
        )

    def __enter__(self) -> Callable[[int, int | None], None]:
        self._progress.start()
        return self._update

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _update(self, received: int, total: int | None) -> None:
        if self._task is None:
            if not stderr.is_terminal:
                stderr.print(f"fetching {self._name}")
            self._task = self._progress.add_task(self._name, total=total)
        self._progress.update(self._task, completed=received, total=total)


class StepBar:
    """A bar over the steps of all pictures that are generated, on stderr while it is a terminal."""

    def __init__(self, pictures: int, steps: int) -> None:
        self._pictures, self._steps = pictures, steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=stderr,
            disable=not stderr.is_terminal,
        )
        self._task: Any = self._progress.add_task("", total=pictures * steps)

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, picture: int, name: str) -> None:
        """The picture of that number, from 0, is begun; those before it are done."""
        description = f"{name} ({picture + 1} of {self._pictures})"
        self._progress.update(self._task, description=description, completed=picture * self._steps)

    def step(self) -> None:
        """One step more is done."""
        self._progress.advance(self._task)
