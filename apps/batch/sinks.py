"""Rows to disk or to the screen.

A file sink appends encoded rows to a journal and tells how long it is; the ledger keeps count, so that a run can be
cut anywhere and go on. For `.csv` and `.jsonl` the journal is the output itself. Parquet cannot be appended to: its
journal is an Arrow stream beside the output, turned into the output in one step at the end; or, if the output is a
folder, into one more part whenever there are rows enough.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from ..errors import Stopped, UsageError
from .ledger import Part, beside
from .stage import Column, Row

__all__ = [
    "SUFFIXES",
    "CsvSink",
    "FileSink",
    "JsonlSink",
    "Lost",
    "ParquetSink",
    "PartsSink",
    "file_sink",
    "json_line",
    "stdout_writer",
]

SUFFIXES = (".csv", ".jsonl", ".parquet")
_ROW_GROUP = 16_384


class Lost(Stopped):
    """The file of a run was taken away while it was written, so that none of its rows is kept."""


class FileSink(ABC):
    """Appends rows to a journal file.

    Args:
        path: The output.
        columns: All columns, in order.
    """

    def __init__(self, path: str, columns: Sequence[Column]) -> None:
        self.path = path
        self.columns = columns
        self._file: io.FileIO | None = None
        self._length = 0

    @property
    def journal(self) -> str:
        """The file that rows are appended to."""
        return self.path

    def exists(self) -> bool:
        """Whether an earlier run has left something."""
        return os.path.exists(self.path) or os.path.exists(self.journal)

    def begin(self, length: int) -> None:
        """Opens the journal and cuts it to the bytes that are known to be good."""
        self._file = open(self.journal, "ab", buffering=0)
        self._file.truncate(length)
        self._length = length

    def append(self, rows: Sequence[Row]) -> bytes:
        """Writes rows and returns the bytes written, which have left this process when this returns.

        Raises:
            OSError: The disk is full, …
            Lost: The file or its folder is gone.
        """
        self._check_there()
        content = (b"" if self._length else self.header()) + self.encode(rows)
        before = self._length
        try:
            self._write(content)
        except OSError:
            assert self._file is not None
            self._file.truncate(before)  # a part of a row would help nobody
            raise
        return content

    def finish(self) -> None:
        """Makes the output complete and durable.

        Raises:
            OSError: The disk is full, …
            Lost: The file or its folder is gone.
        """
        assert self._file is not None
        if not self._length:
            self._write(self.header())
        self._check_there()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the journal; what was appended stays."""
        if self._file is not None:
            self._file.close()

    @abstractmethod
    def header(self) -> bytes:
        """What stands before the first row."""

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> bytes:
        """Rows as they stand in the journal."""

    def _check_there(self) -> None:
        """A file that was removed can be written to as long as it is open, and is gone thereafter."""
        assert self._file is not None
        try:
            there = os.path.samestat(os.stat(self.journal), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            there = False
        if not there:
            raise Lost(
                f"{self.journal} was removed while it was written, and its rows with it; run the same command again to "
                "begin anew"
            )

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]
        self._length += len(content)


class CsvSink(FileSink):
    """Comma-separated values with a header line; a list stands in its cell as JSON."""

    def header(self) -> bytes:
        return _csv_line([column.name for column in self.columns])

    def encode(self, rows: Sequence[Row]) -> bytes:
        return b"".join(_csv_line([_csv_cell(row[column.name]) for column in self.columns]) for row in rows)


class JsonlSink(FileSink):
    """One JSON object a line."""

    def header(self) -> bytes:
        return b""

    def encode(self, rows: Sequence[Row]) -> bytes:
        return b"".join(json_line(row, self.columns) for row in rows)


class ParquetSink(FileSink):
    """Parquet, through an Arrow stream beside it that rows are appended to."""

    def __init__(self, path: str, columns: Sequence[Column]) -> None:
        super().__init__(path, columns)
        import pyarrow as pa

        kinds = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64(), "floats": pa.list_(pa.float32())}
        self._schema = pa.schema([(column.name, kinds[column.kind]) for column in columns])

    @property
    def journal(self) -> str:
        return f"{self.path}.journal"

    def header(self) -> bytes:
        return self._schema.serialize().to_pybytes()

    def encode(self, rows: Sequence[Row]) -> bytes:
        import pyarrow as pa

        return pa.RecordBatch.from_pylist(list(rows), schema=self._schema).serialize().to_pybytes()

    def finish(self) -> None:
        super().finish()
        self.close()
        write_parquet(self.journal, self.path, f"{self.path}.part")
        os.unlink(self.journal)


class PartsSink(ParquetSink):
    """A folder of Parquet files, each of which appears whole and once; what is not in one yet is in the journal.

    Args:
        path: The folder with its slash, then what the names of this run's files begin with.
        columns: All columns, in order.
    """

    rows_per_part = 100_000

    def __init__(self, path: str, columns: Sequence[Column]) -> None:
        super().__init__(path, columns)
        self._parts = self._loose = 0

    @property
    def journal(self) -> str:
        return beside(self.path, "journal")

    @property
    def is_full(self) -> bool:
        """Whether there are rows enough for a part."""
        return self._loose >= self.rows_per_part

    def exists(self) -> bool:
        """Whether an earlier run has left something.

        Raises:
            UsageError: The folder holds what is no part of such a run; readers would take it for rows.
        """
        folder, prefix = os.path.split(self.path)
        family = re.compile(re.sub(r"^\d{5}", r"\\d{5}", prefix) + r"part-\d{5}\.parquet")
        names = [name for name in os.listdir(folder) if name[0] not in "._"]
        if strange := next((name for name in names if not family.fullmatch(name)), None):
            raise UsageError(f"{folder} holds {strange!r}, which is no part of this run; choose an empty folder for -o")
        return os.path.exists(self.journal) or any(map(self._is_own, names))

    def check(self, part: Part) -> None:
        """Holds a part against what the ledger says of it.

        Raises:
            UsageError: It is gone or was changed.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = os.path.join(os.path.dirname(self.path), part.part)
        try:
            same = pq.read_metadata(path).num_rows == part.rows
        except (OSError, pa.ArrowException):
            same = False
        if not same:
            raise UsageError(f"{path} was removed or changed by something else; choose another -o, or --overwrite it")

    def begin(self, length: int, parts: int = 0, loose: int = 0) -> None:
        """The same as for any sink; parts beyond so many are removed, so many rows are in the journal."""
        folder = os.path.dirname(self.path)
        for name in filter(self._is_own, os.listdir(folder)):
            if int(name[-13:-8]) >= parts:
                os.unlink(os.path.join(folder, name))
        super().begin(length)
        self._parts, self._loose = parts, loose

    def append(self, rows: Sequence[Row]) -> bytes:
        content = super().append(rows)
        self._loose += len(rows)
        return content

    def close_part(self) -> Part | None:
        """Makes a part of the rows in the journal, which stay there until `reopen`; None if there are none."""
        assert self._file is not None
        if not self._loose:
            return None
        self._check_there()
        os.fsync(self._file.fileno())
        path = f"{self.path}part-{self._parts:05d}.parquet"
        write_parquet(self.journal, path, beside(self.path, "part"))
        return Part(os.path.basename(path), self._loose)

    def reopen(self) -> None:
        """Empties the journal: its rows are in a part, and the ledger says so."""
        self.close()
        super().begin(0)
        self._parts, self._loose = self._parts + 1, 0

    def finish(self) -> None:
        self.close()
        os.unlink(self.journal)

    def _is_own(self, name: str) -> bool:
        return re.fullmatch(re.escape(os.path.basename(self.path)) + r"part-\d{5}\.parquet", name) is not None


def write_parquet(journal: str, path: str, part: str) -> None:
    """Turns an Arrow stream into a Parquet file that appears in one step, in constant memory; before, it is `part`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.OSFile(journal) as stream, pa.ipc.open_stream(stream) as reader:
        try:
            with pq.ParquetWriter(part, reader.schema) as writer:
                for table in _gathered(reader):
                    writer.write_table(table)
            with open(part, "rb") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
        except BaseException:
            if os.path.exists(part):
                os.unlink(part)
            raise


def file_sink(path: str, columns: Sequence[Column]) -> FileSink:
    """The sink that fits the suffix of an output file, or a folder if it has none.

    Raises:
        UsageError: The suffix is not one of `.csv`, `.jsonl`, `.parquet`.
    """
    sinks: dict[str, Callable[[str, Sequence[Column]], FileSink]] = {
        ".csv": CsvSink,
        ".jsonl": JsonlSink,
        ".parquet": ParquetSink,
        "": PartsSink,
    }
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in sinks:
        raise UsageError(f"output {path!r} must end in {', '.join(SUFFIXES)}")
    return sinks[suffix](path, columns)


def json_line(row: Row, columns: Sequence[Column]) -> bytes:
    """A row as one line of JSON, columns in order."""
    cells = (f"{json.dumps(column.name)}: {_json_cell(row[column.name])}" for column in columns)
    return f"{{{', '.join(cells)}}}\n".encode()


def stdout_writer(stream: IO[str], columns: Sequence[Column], form: str) -> Callable[[Sequence[Row]], None]:
    """Writes rows to a stream as they come.

    Args:
        stream: Usually standard output.
        columns: All columns, in order.
        form: `"csv"` or `"json"`.
    """
    if form == "csv":
        stream.write(_csv_line([column.name for column in columns]).decode())

    def write(rows: Sequence[Row]) -> None:
        for row in rows:
            line = json_line(row, columns) if form == "json" else _csv_line([_csv_cell(row[c.name]) for c in columns])
            stream.write(line.decode())
        stream.flush()

    return write


def _csv_line(cells: Sequence[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def _csv_cell(value: Any) -> Any:
    return _json_numbers(value) if isinstance(value, np.ndarray) else value


def _json_cell(value: Any) -> str:
    return _json_numbers(value) if isinstance(value, np.ndarray) else json.dumps(value, ensure_ascii=False)


def _json_numbers(vector: np.ndarray) -> str:
    """Shortest digits that give the same float32 back: a third of what the same numbers take as doubles."""
    import pyarrow as pa  # six times as fast as NumPy or Python, which would cost a tenth of a light network's time

    return f"[{', '.join(pa.array(vector).cast(pa.string()).to_pylist())}]"


def _gathered(reader: Any) -> Iterator[Any]:
    """The batches of a stream, put together to row groups of a useful size."""
    import pyarrow as pa

    waiting, count = [], 0
    for batch in reader:
        waiting.append(batch)
        count += batch.num_rows
        if count >= _ROW_GROUP:
            yield pa.Table.from_batches(waiting)
            waiting, count = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)
