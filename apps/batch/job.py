"""A whole run: inputs through a stage to a file or the screen, once and only once each."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from ..errors import Interrupted, Stopped, UsageError
from .engines import Emit, Engine, Rest, Stop
from .ledger import Commit, Kept, Ledger, digest, digest_inputs
from .sinks import SUFFIXES, FileSink, Lost, PartsSink, file_sink
from .sources import Inputs, Source
from .stage import COMMON_COLUMNS, Column, Row, Stage

__all__ = ["Job", "Report", "Screen", "Summary", "check_output"]


class Report(Protocol):
    """Where a run tells how it goes."""

    def note(self, message: str) -> None:
        """One line the user should read."""

    def start(self, inputs: Inputs, done: int) -> None:
        """Work begins, `done` rows being there already."""

    def advance(self, count: int) -> None:
        """So many more rows are written."""

    def stop(self) -> None:
        """Work has ended."""


class Screen(Protocol):
    """Shows rows as they come, where no file was asked for."""

    def begin(self, stage: Stage, columns: tuple[Column, ...]) -> None:
        """Called once, before the first rows."""

    def show(self, rows: list[Row]) -> None:
        """Called with every batch."""


@dataclass(frozen=True)
class Summary:
    """What came of a run.

    Attributes:
        rows: Rows in the output, those of an earlier run included.
        failed: How many of them have `status=error`.
        computed: How many were made now.
        seconds: What that took, loading aside.
        output: The output file, or None for the screen.
    """

    rows: int
    failed: int
    computed: int
    seconds: float
    output: str | None

    @property
    def rate(self) -> float:
        """Inputs a second."""
        return self.computed / self.seconds if self.seconds else 0.0


def check_output(path: str, parts: bool = False) -> None:
    """Finds out before any long work whether an output file can be written.

    Args:
        path: Of the output.
        parts: Whether it may be a folder of parts, which is made if it is not there.

    Raises:
        UsageError: Wrong suffix, no such folder, or no permission.
    """
    if parts and path.endswith("/"):
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the output folder {path}: {error.strerror}") from error
        if not os.access(path, os.W_OK):
            raise UsageError(f"no permission to write to {path}")
        return
    if os.path.splitext(path)[1].lower() not in SUFFIXES:
        raise UsageError(
            f"output {path!r} must end in {', '.join(SUFFIXES)}: the suffix chooses the format"
            + (", or in / for a folder of Parquet files" if parts else "")
        )
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise UsageError(f"the folder {folder} of the output does not exist; create it first")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UsageError(f"output {path!r} exists and is not a file")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"no permission to write {path!r}")


@dataclass
class Job:
    """A run as the user ordered it.

    Attributes:
        inputs: What to read.
        make_stage: Loads the network and makes the stage; called only if there is something to do.
        command: What the rows depend on, besides the inputs' content.
        report: Told how it goes.
        engine: Moves the inputs through the stage.
        resume: Go on where an earlier run of the same command ended.
        overwrite: Replace what an earlier run wrote.
        rows_per_part: Rows of each file, if the output is a folder; None for the sink's own number.
    """

    inputs: Inputs
    make_stage: Callable[[], Stage]
    command: dict[str, Any]
    report: Report
    engine: Engine
    resume: bool = True
    overwrite: bool = False
    rows_per_part: int | None = None

    def to_screen(self, screen: Screen) -> Summary:
        """Runs over all inputs and shows the rows; nothing is kept."""
        stage = self.make_stage()
        tally = _Tally(self.report)
        screen.begin(stage, COMMON_COLUMNS + stage.columns)

        def emit(sources: Sequence[Source], rows: list[Row]) -> None:
            screen.show(rows)
            tally.add(rows)

        with Stop() as stop:
            self._work(stage, self._rest(iter(self.inputs), 0), emit, stop, tally)
        if stop.signum is not None:
            raise Interrupted(f"stopped after {tally.rows:,} rows", stop.signum)
        return tally.summary(Kept(), None)

    def to_file(self, output: str) -> Summary:
        """Runs over the inputs that the output has no rows for yet.

        Raises:
            UsageError: The output belongs to something else.
            Stopped: The run ended early; the same command goes on from there.
        """
        ledger = Ledger(output, self.command)
        try:
            return self._to_file(output, ledger)
        finally:
            ledger.close()

    def _to_file(self, output: str, ledger: Ledger) -> Summary:
        kept, sources = self._earlier(output, ledger)
        first = next(sources, None)
        if first is None and kept.rows and not kept.dropped and _is_finished(output):
            self.report.note(f"nothing to do: {output} has a row for each of the {kept.rows:,} inputs")
            return _Tally(self.report).summary(kept, output)
        if kept.dropped:
            self.report.note(f"inputs have changed since {output} was written: {kept.dropped:,} rows are made anew")
        stage = self.make_stage()
        sink = file_sink(output, COMMON_COLUMNS + stage.columns)
        tally = _Tally(self.report)
        try:
            ledger.begin(kept)
            if isinstance(sink, PartsSink):
                sink.rows_per_part = self.rows_per_part or sink.rows_per_part
                sink.begin(kept.end, kept.parts, kept.loose)
            else:
                sink.begin(kept.end)
            with Stop() as stop:
                rest = self._rest(sources if first is None else chain([first], sources), kept.rows)
                self._work(stage, rest, _recorder(sink, ledger, tally, kept.end), stop, tally)
                if stop.signum is None:
                    if isinstance(sink, PartsSink):
                        _close_part(sink, ledger)
                    sink.finish()
                    ledger.finish()
        except UsageError:
            if not kept.rows + tally.rows:  # it shows only now that this command can never work
                os.unlink(sink.journal)
                ledger.clear()
            raise
        except OSError as error:
            reason = f"cannot write {error.filename or output}: {error.strerror}"
            raise Stopped(f"{reason}. {self._how_to_go_on(kept, tally)}") from error
        except Lost:
            raise
        except Stopped as error:
            raise Stopped(f"{error}. {self._how_to_go_on(kept, tally)}") from error
        finally:
            sink.close()
        if stop.signum is not None:
            raise Interrupted(f"stopped on request. {self._how_to_go_on(kept, tally)}", stop.signum)
        return tally.summary(kept, output)

    def _earlier(self, output: str, ledger: Ledger) -> tuple[Kept, Iterator[Source]]:
        """What an earlier run left that can be built on, and the inputs that are still to do."""
        sink = file_sink(output, ())
        journal = sink.journal
        if not sink.exists() or self.overwrite:
            return Kept(), iter(self.inputs)
        if not self.resume:
            raise UsageError(f"{output} exists; --overwrite replaces it, --resume goes on with it")
        differences = ledger.differences()
        if differences is None:
            raise UsageError(f"{output} exists and was not made by this command; choose another -o, or --overwrite it")
        if differences:
            raise UsageError(
                f"{output} was made by another command ({'; '.join(differences)}); choose another -o, or --overwrite it"
            )
        if isinstance(sink, PartsSink):
            return ledger.resume(self.inputs, journal, sink.check)
        if journal == output or not _is_finished(output):
            return ledger.resume(self.inputs, journal)
        return self._finished(output, *ledger.resume(self.inputs, None))

    def _finished(self, output: str, kept: Kept, sources: Iterator[Source]) -> tuple[Kept, Iterator[Source]]:
        """A finished Parquet file stands if nothing changed; it cannot be added to, so else it is made anew."""
        import pyarrow.parquet as pq

        first = next(sources, None)
        if first is not None or kept.dropped:
            return Kept(dropped=kept.rows + kept.dropped), iter(self.inputs)
        if pq.read_metadata(output).num_rows != kept.rows:
            raise UsageError(f"{output} was changed by something else; choose another -o, or --overwrite it")
        return kept, iter(())

    def _rest(self, sources: Iterator[Source], done: int) -> Rest:
        inputs = copy.copy(self.inputs)
        inputs.note = logging.getLogger(__name__).debug  # another process that lists them has no terminal
        return Rest(sources, inputs, done)

    def _work(self, stage: Stage, rest: Rest, emit: Emit, stop: Stop, tally: _Tally) -> None:
        self.report.start(self.inputs, rest.done)
        tally.begin()
        try:
            self.engine(stage, rest, emit, stop)
        finally:
            tally.end()
            self.report.stop()

    def _how_to_go_on(self, kept: Kept, tally: _Tally) -> str:
        return f"{kept.rows + tally.rows:,} rows are safe; run the same command again to go on"


class _Tally:
    """Counts rows and time."""

    def __init__(self, report: Report) -> None:
        self.rows = self.failed = 0
        self._report = report
        self._start = self._end = 0.0

    def begin(self) -> None:
        self._start = time.monotonic()

    def end(self) -> None:
        self._end = time.monotonic()

    def add(self, rows: list[Row]) -> None:
        self.rows += len(rows)
        self.failed += _failed(rows)
        self._report.advance(len(rows))

    def summary(self, kept: Kept, output: str | None) -> Summary:
        return Summary(kept.rows + self.rows, kept.failed + self.failed, self.rows, self._end - self._start, output)


def _recorder(sink: FileSink, ledger: Ledger, tally: _Tally, end: int) -> Emit:
    """Writes a batch's rows, then the line in the ledger that makes them count."""

    def emit(sources: Sequence[Source], rows: list[Row]) -> None:
        nonlocal end
        content = sink.append(rows)
        end += len(content)
        ledger.record(Commit(len(rows), _failed(rows), digest_inputs(sources), digest(content), end))
        tally.add(rows)
        if isinstance(sink, PartsSink) and sink.is_full:
            _close_part(sink, ledger)
            end = 0

    return emit


def _close_part(sink: PartsSink, ledger: Ledger) -> None:
    """In this order, so that at any moment each row is in the journal or in a part that the ledger knows."""
    part = sink.close_part()
    if part is not None:
        ledger.record(part)
        sink.reopen()


def _failed(rows: list[Row]) -> int:
    return sum(row["status"] == "error" for row in rows)


def _journal_beside(output: str) -> str:
    return file_sink(output, ()).journal


def _is_finished(output: str) -> bool:
    """Whether nothing but rows can be missing: a Parquet file that still has its journal is to be made from it."""
    journal = _journal_beside(output)
    return journal == output or not os.path.exists(journal)
