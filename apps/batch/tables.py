"""Pictures in Parquet files, as datasets are published: a column of bytes, or of `{bytes, path}` as `datasets` writes.

Rows are read in order and a few at a time: a row group can be larger than memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from .remote import is_remote, open_file

__all__ = ["count_rows", "picture_bytes"]

_NAMES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "content", "data")
_ROWS_AT_ONCE = 32


def count_rows(path: str) -> int:
    """How many pictures a Parquet file has.

    Raises:
        ValueError: It has no column of pictures, or more than one that could be it.
        OSError: It cannot be read. A damaged file can raise other errors, too.
    """
    with _opened(path) as file:
        _column(file.schema_arrow)
        return file.metadata.num_rows


def picture_bytes(path: str, row: int, stamp: str) -> bytes:
    """The bytes of one picture; cheapest if rows are asked for in order.

    Args:
        path: Of the file.
        row: Which, from 0.
        stamp: Another one means that the file has changed.

    Raises:
        ValueError: There is no such row any more, or nothing in it.
    """
    value = _cursor(path, stamp).at(row)
    if isinstance(value, dict):
        value = value["bytes"]
    if not value:
        raise ValueError("this row holds no picture")
    return value


@functools.lru_cache(maxsize=1)
def _cursor(path: str, stamp: str) -> _Cursor:
    return _Cursor(path)


class _Cursor:
    """A place in a file that moves forward, and goes back to the start of a row group if it must."""

    def __init__(self, path: str) -> None:
        self._file = _opened(path)
        self._column = _column(self._file.schema_arrow)
        metadata = self._file.metadata
        self._groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._batches: Iterator[Any] = iter(())
        self._group, self._first, self._rows = -1, 0, []

    def at(self, row: int) -> Any:
        """The value of a row."""
        group, begin = self._group_of(row)
        if group != self._group or row < self._first:
            self._batches = self._file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[self._column])
            self._group, self._first, self._rows = group, begin, []
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError("the file has fewer rows than it says")
            self._rows = batch.column(0).to_pylist()
        return self._rows[row - self._first]

    def _group_of(self, row: int) -> tuple[int, int]:
        begin = 0
        for group, rows in enumerate(self._groups):
            if row < begin + rows:
                return group, begin
            begin += rows
        raise ValueError(f"the file has {begin:,} rows, so there is no row {row:,}")


def _opened(path: str) -> Any:
    import pyarrow.parquet as pq

    if not is_remote(path):
        return pq.ParquetFile(path, pre_buffer=False)
    return pq.ParquetFile(open_file(path), pre_buffer=False)


def _column(schema: Any) -> str:
    """The column of pictures: by its name, else the only one that can hold them."""
    import pyarrow as pa

    def fits(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and fits(kind.field("bytes").type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    fitting = [field.name for field in schema if fits(field.type)]
    named = [name for name in _NAMES if name in fitting]
    if named or len(fitting) == 1:
        return named[0] if named else fitting[0]
    raise ValueError(
        f"no column of pictures: expected bytes, or a struct with bytes, in a column called {', '.join(_NAMES[:3])} or "
        f"in the only one of that kind (columns: {', '.join(schema.names)})"
    )
