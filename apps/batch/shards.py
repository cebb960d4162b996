"""A run in parts that know nothing of each other, and the parts put together: what job arrays and cron need.

Inputs are dealt out like cards: of N shards, shard I takes every N-th file, beginning with the I-th (from 0). A tar
archive goes to one shard whole. Each shard writes a part of its own, with its own ledger.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..errors import UsageError
from .ledger import Ledger, Recorded
from .sinks import SUFFIXES

__all__ = ["Merged", "Shard", "merge", "read_shard"]


@dataclass(frozen=True)
class Shard:
    """One of several parts of a run.

    Attributes:
        index: Which, from 0.
        count: Of how many.
    """

    index: int
    count: int

    def takes(self, place: int) -> bool:
        """Whether the file at this place of the listing is one of its own."""
        return place % self.count == self.index

    def part(self, output: str) -> str:
        """What it writes: of `labels.csv` `labels-00003-of-00016.csv`; of `labels/` files called `00003-of-00016-…`."""
        name = f"{self.index:05d}-of-{self.count:05d}"
        stem, suffix = os.path.splitext(output)
        return f"{stem}-{name}{suffix}" if suffix else f"{output}{name}-"


@dataclass(frozen=True)
class Merged:
    """What came of putting parts together.

    Attributes:
        rows: Rows of the output.
        failed: How many of them have `status=error`.
        parts: The files they came from.
    """

    rows: int
    failed: int
    parts: Sequence[str]


def read_shard(text: str) -> Shard:
    """Reads `I/N`.

    Raises:
        UsageError: It is something else, or there is no such shard.
    """
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip())
    if found is None:
        raise UsageError(f"--shard {text}: expected I/N, such as 0/16 for the first of sixteen")
    index, count = int(found[1]), int(found[2])
    if index >= count:
        last = f"the last of {count} is {count - 1}/{count}" if count else "there must be at least one"
        raise UsageError(f"--shard {text}: shards count from 0, {last}")
    return Shard(index, count)


def merge(output: str, overwrite: bool = False) -> Merged:
    """Puts the parts of all shards into one file, which appears in one step; the parts stay.

    Args:
        output: What was given as `-o` to each shard.
        overwrite: Replace the file if it is there.

    Returns:
        What is in it.

    Raises:
        UsageError: A part is missing, unfinished or of another command, or is being written right now.
    """
    if output.endswith("/"):
        raise UsageError(f"{output} is a folder of parts, which is read as it is; there is nothing to merge")
    if os.path.splitext(output)[1].lower() not in SUFFIXES:
        raise UsageError(f"{output!r} must end in {', '.join(SUFFIXES)}")
    if os.path.lexists(output) and not overwrite:
        raise UsageError(f"{output} exists; --overwrite replaces it")
    parts = _parts(output)
    with ExitStack() as stack:
        ledgers = [stack.enter_context(Ledger.reading(part)) for part in parts]
        recorded = [_checked(part, ledger.recorded()) for part, ledger in zip(parts, ledgers, strict=True)]
        _check_commands(parts, recorded)
        unfinished = f"{output}.part"
        try:
            _joined(parts, unfinished)
            with open(unfinished, "rb") as written:
                os.fsync(written.fileno())
            os.replace(unfinished, output)
        except BaseException:
            if os.path.exists(unfinished):
                os.unlink(unfinished)
            raise
    return Merged(sum(one.rows for one in recorded), sum(one.failed for one in recorded), parts)


def _parts(output: str) -> list[str]:
    """The parts of all shards, in order."""
    folder, name = os.path.split(output)
    stem, suffix = os.path.splitext(name)
    pattern = re.compile(rf"{re.escape(stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)}")
    try:
        found = [match for entry in os.listdir(folder or os.curdir) if (match := pattern.fullmatch(entry))]
    except OSError as error:
        raise UsageError(f"cannot list the folder {folder}: {error.strerror}") from error
    if not found:
        raise UsageError(f"there is no part of {output} to merge, such as {Shard(0, 2).part(output)}")
    counts = sorted({int(match[2]) for match in found})
    if len(counts) > 1:
        raise UsageError(
            f"{output} has parts of {' and of '.join(map(str, counts))} shards: move away those that do not belong here"
        )
    there = {int(match[1]) for match in found}
    if missing := [index for index in range(counts[0]) if index not in there]:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UsageError(f"the part of --shard {missing[0]}/{counts[0]}{more} is missing: run it first")
    return [Shard(index, counts[0]).part(output) for index in range(counts[0])]


def _checked(part: str, recorded: Recorded) -> Recorded:
    if recorded.command is None:
        raise UsageError(f"{part} has no readable ledger beside it, so it is not known whether it is whole")
    if not recorded.finished:
        raise UsageError(f"{part} is not finished: run its command again, which goes on where it ended")
    return recorded


def _check_commands(parts: Sequence[str], recorded: Sequence[Recorded]) -> None:
    """All parts must come from one command, but for the shard."""
    first, *others = ({**(one.command or {}), "shard": None} for one in recorded)
    for part, command in zip(parts[1:], others, strict=True):
        if differing := [name for name in {**first, **command} if first.get(name) != command.get(name)]:
            raise UsageError(f"{parts[0]} and {part} were made by different commands: {', '.join(differing)} differ")


def _joined(parts: Sequence[str], path: str) -> None:
    joiners: dict[str, Callable[[Sequence[str], str], None]] = {
        ".csv": _joined_csv,
        ".jsonl": _joined_lines,
        ".parquet": _joined_parquet,
    }
    joiners[os.path.splitext(parts[0])[1].lower()](parts, path)


def _joined_csv(parts: Sequence[str], path: str) -> None:
    header = b""
    with open(path, "wb") as output:
        for part in parts:
            with open(part, "rb") as rows:
                line = rows.readline()
                if not header:
                    header = line
                    output.write(header)
                if line != header:
                    raise UsageError(f"{part} has other columns than {parts[0]}")
                shutil.copyfileobj(rows, output)


def _joined_lines(parts: Sequence[str], path: str) -> None:
    with open(path, "wb") as output:
        for part in parts:
            with open(part, "rb") as rows:
                shutil.copyfileobj(rows, output)


def _joined_parquet(parts: Sequence[str], path: str) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(parts[0])
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                if file.schema_arrow != schema:
                    raise UsageError(f"{part} has other columns than {parts[0]}")
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))
