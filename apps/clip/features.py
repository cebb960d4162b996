"""Features that `attnsuite embed` has saved, read back in pieces: memory does not depend on how many there are."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..batch.sinks import SUFFIXES
from ..errors import UsageError

__all__ = ["Piece", "is_features", "label_of", "pieces"]

_COLUMNS = ("path", "status", "model", "embedding")
_PIECE = 1024


@dataclass(frozen=True)
class Piece:
    """A part of a file of features.

    Attributes:
        label: Of the model that made them.
        paths: The images, as rows have them.
        features: `[N, D]`, float32; a row each.
        failed: How many rows of this part are no features, as their images could not be read.
    """

    label: str
    paths: list[str]
    features: np.ndarray
    failed: int


def is_features(name: str) -> bool:
    """Whether an input is a file of features by its name."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def label_of(path: str) -> str:
    """The model that made a file of features.

    Raises:
        UsageError: As `pieces`.
    """
    return next(pieces(path)).label


def pieces(path: str) -> Iterator[Piece]:
    """Reads a file of features.

    Args:
        path: What `attnsuite embed -o` wrote.

    Raises:
        UsageError: It cannot be read, lacks a column, mixes models or lengths, or holds no features at all.
    """
    label: str | None = None
    length: int | None = None
    found = rows = 0
    for piece in _read(path):
        rows += len(piece.paths) + piece.failed
        label = label or piece.label
        if piece.label != label:
            raise UsageError(f"{path} mixes the features of {label} and {piece.label}; embed all images with one model")
        if piece.paths:
            length = length or piece.features.shape[1]
            if piece.features.shape[1] != length:
                raise UsageError(f"{path} mixes features of {length} and {piece.features.shape[1]} values")
            found += len(piece.paths)
        yield piece
    if not found:
        why = "it is empty" if not rows else f"none of its {rows:,} images could be read"
        raise UsageError(f"{path} holds no features: {why}")


def _read(path: str) -> Iterator[Piece]:
    kinds = {".csv": _csv_rows, ".jsonl": _json_rows}
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
            return
        with open(path, encoding="utf-8", newline="") as file:
            rows = kinds[suffix](path, file)
            while batch := list(islice(rows, _PIECE)):
                yield _piece(path, batch)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text in UTF-8, as `attnsuite embed` writes {suffix}") from error


def _csv_rows(path: str, file: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)  # a vector stands in one cell
    reader = csv.DictReader(file)
    _require_columns(path, reader.fieldnames)
    for number, row in enumerate(reader, 2):
        yield row | {"embedding": _vector(path, number, row["embedding"])}


def _json_rows(path: str, file: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"line {number:,} of {path} is not JSON; was it cut off?") from error
        _require_columns(path, row if isinstance(row, Mapping) else None)
        yield row


def _vector(path: str, number: int, cell: str | None) -> Any:
    try:
        return json.loads(cell) if cell else None
    except ValueError as error:
        raise UsageError(f"row {number:,} of {path} holds no list of numbers; was it cut off?") from error


def _piece(path: str, rows: Sequence[Mapping[str, Any]]) -> Piece:
    good = [row for row in rows if row["status"] == "ok"]
    return _checked(path, rows, [row["path"] for row in good], [row["embedding"] for row in good])


def _checked(path: str, rows: Sequence[Mapping[str, Any]], paths: list[str], values: Any) -> Piece:
    labels = sorted({str(row["model"]) for row in rows})
    if len(labels) > 1:
        raise UsageError(f"{path} mixes the features of {' and '.join(labels)}; embed all images with one model")
    try:
        features = np.asarray(values, np.float32).reshape(len(paths), -1) if paths else np.empty((0, 0), np.float32)
        if paths and not features.size:
            raise ValueError("no values")
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: 'embedding' must hold lists of numbers, all of one length") from error
    if not np.isfinite(features).all():
        raise UsageError(f"{path}: 'embedding' holds values that are not numbers")
    return Piece(labels[0], paths, features, len(rows) - len(paths))


def _parquet(path: str) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(_PIECE, columns=list(_COLUMNS)):
                rows = batch.select(["path", "status", "model"]).to_pylist()
                good = [row["status"] == "ok" for row in rows]
                vectors: Any = batch.column("embedding").filter(pa.array(good))
                values: Any = ()  # which is refused as any other lists that are none of numbers and of one length
                if pa.types.is_list(vectors.type) and len(set(vectors.value_lengths().to_pylist())) <= 1:
                    values = vectors.flatten().to_numpy(zero_copy_only=False)
                yield _checked(path, rows, [row["path"] for row in rows if row["status"] == "ok"], values)
    except pa.ArrowInvalid as error:
        raise UsageError(f"{path} is no Parquet file, or was cut off") from error


def _require_columns(path: str, names: Iterable[str] | None) -> None:
    there = list(names or ())
    if missing := [name for name in _COLUMNS if name not in there]:
        what = f"lacks the columns {', '.join(missing)}" if there else "holds no rows"
        raise UsageError(f"{path} {what}: search takes images, or what `attnsuite embed … --clip MODEL -o` wrote")
