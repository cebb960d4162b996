"""What a run has finished, kept beside its output, so that the same command can go on after any kind of end.

The ledger of `labels.csv` is `labels.csv.ledger`: first the command, then a line a batch, with a digest of its inputs'
names and stamps, and where its rows end in the journal. A batch counts as done once its line is complete, which is
written after its rows. A last line says that there was no more to do. To go on, the inputs are listed anew and compared
batch by batch; the first that differs is where work begins again. Memory stays the same whatever the number of inputs.
Where the output is a folder of parts, a line says of each that it is whole; what the journal held is then in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any, BinaryIO

from ..errors import UsageError
from .sources import Source

__all__ = ["Commit", "Kept", "Ledger", "Part", "Recorded", "beside", "digest", "digest_inputs"]

_FORMAT = 1
_FINISHED = b'{"finished": true}'
_PIECE = 1 << 20


def digest(content: bytes) -> str:
    """A short digest of bytes."""
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def beside(output: str, what: str) -> str:
    """The file that belongs to an output: `labels.csv.ledger`; for a folder `labels/` a name that readers pass over."""
    folder, name = os.path.split(output)
    return f"{output}.{what}" if os.path.splitext(name)[1] else os.path.join(folder, f"_{name}{what}")


def digest_inputs(sources: Iterable[Source]) -> str:
    """A digest of inputs, in order: names, and stamps that change with the content."""
    text = "\n".join(source.key for source in sources)
    return digest(text.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True)
class Commit:
    """A finished batch: how many rows, how many of them errors, digests of inputs and journal bytes, their end."""

    rows: int
    failed: int
    inputs: str
    content: str
    end: int


@dataclass(frozen=True)
class Part:
    """A part of an output that is a folder: its file, and how many rows are in it."""

    part: str
    rows: int


@dataclass(frozen=True)
class Kept:
    """What of an earlier run still holds.

    Attributes:
        rows: Rows in its finished batches.
        failed: How many of them have `status=error`.
        end: Length of the journal up to there.
        dropped: How many more rows it had that do not hold any more, since the inputs changed.
        place: Length of the ledger up to there.
        parts: Whole parts, if the output is a folder.
        loose: Rows after the last of them, in the journal.
    """

    rows: int = 0
    failed: int = 0
    end: int = 0
    dropped: int = 0
    place: int = 0
    parts: int = 0
    loose: int = 0


@dataclass(frozen=True)
class Recorded:
    """What a ledger says, taken at its word.

    Attributes:
        command: What the rows depend on; None if that cannot be read.
        rows: Rows in finished batches.
        failed: How many of them have `status=error`.
        finished: Whether the run came to its end.
    """

    command: dict[str, Any] | None
    rows: int
    failed: int
    finished: bool


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return io.BytesIO()


class Ledger:
    """The ledger of one output; while it is open, no other process can open it.

    Args:
        output: Path of the output.
        command: What the rows depend on; another command may not add to the same output.

    Raises:
        UsageError: Another run is writing this output, or its folder cannot be written to.
    """

    def __init__(self, output: str, command: dict[str, Any]) -> None:
        self.path = beside(output, "ledger")
        self._output = output
        self._command = command
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            folder = os.path.dirname(os.path.abspath(output))
            raise UsageError(f"cannot write to the folder {folder}: {error.strerror}") from error
        try:
            # A record lock belongs to this process alone: decode workers may outlive a killed run by some seconds.
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise UsageError(f"another run is writing {output} right now; wait for it or choose another -o") from error

    @classmethod
    @contextlib.contextmanager
    def reading(cls, output: str) -> Iterator[Ledger]:
        """The ledger of an output that must be there, kept from other runs meanwhile.

        Raises:
            UsageError: There is none, or another run is writing this output.
        """
        path = beside(output, "ledger")
        if not os.path.isfile(path):
            raise UsageError(f"{output} has no ledger beside it ({path}), so it is not known what it holds")
        ledger = cls(output, {})
        try:
            yield ledger
        finally:
            ledger.close()

    def recorded(self) -> Recorded:
        """What was recorded, not compared with any input."""
        try:
            command = json.loads(next(self._lines(), b""))["command"]
        except (ValueError, KeyError, TypeError):
            return Recorded(None, 0, 0, False)
        rows, failed = 0, 0
        for _, entry in self._entries():
            if isinstance(entry, Commit):
                rows, failed = rows + entry.rows, failed + entry.failed
        last = b""
        for line in self._lines():
            last = line
        return Recorded(command, rows, failed, last == _FINISHED)

    def differences(self) -> list[str] | None:
        """How the command that made the output differs from this one; None if that is not known."""
        first = next(self._lines(), b"")
        try:
            recorded = json.loads(first)["command"]
        except (ValueError, KeyError, TypeError):
            return None
        names = dict.fromkeys([*self._command, *recorded])
        return [
            f"{name} was {recorded.get(name)!r}, is {self._command.get(name)!r}"
            for name in names
            if recorded.get(name) != self._command.get(name)
        ]

    def resume(
        self, inputs: Iterable[Source], journal: str | None, check: Callable[[Part], None] | None = None
    ) -> tuple[Kept, Iterator[Source]]:
        """Finds out what of the recorded batches still holds.

        Args:
            inputs: All inputs of the run.
            journal: The journal to compare with, empty if it is not there; None if the output is finished without one.
            check: Raises if a part is not what was written.

        Returns:
            What is kept, and the inputs that come after it.

        Raises:
            UsageError: The journal or a part is not what was written; somebody has edited it.
        """
        closed = max((place for place, entry in self._entries() if isinstance(entry, Part)), default=0)
        kept = whole = Kept()  # up to here, and up to the end of the last whole part
        sources, entries = iter(inputs), self._entries()
        with contextlib.ExitStack() as stack:
            written = None if journal is None else stack.enter_context(_opened(journal))
            for place, entry in entries:
                if isinstance(entry, Part):
                    if check is not None:
                        check(entry)
                    kept = whole = replace(kept, end=0, place=place, parts=kept.parts + 1, loose=0)
                    continue
                batch = list(islice(sources, entry.rows))
                if len(batch) < entry.rows or digest_inputs(batch) != entry.inputs:
                    later = entry.rows + sum(one.rows for _, one in entries if isinstance(one, Commit))
                    if place > closed:
                        return replace(kept, dropped=later), chain(batch, sources)
                    # A part is whole or made anew: back to where it begins.
                    dropped = later + kept.rows - whole.rows
                    return replace(whole, dropped=dropped), islice(iter(inputs), whole.rows, None)
                if written is not None and place > closed and not self._holds(written, kept, entry):
                    return kept, chain(batch, sources)
                kept = replace(
                    kept, rows=kept.rows + entry.rows, failed=kept.failed + entry.failed, end=entry.end, place=place,
                    loose=kept.loose + entry.rows,
                )  # fmt: skip
        return kept, sources

    def _holds(self, written: BinaryIO, kept: Kept, commit: Commit) -> bool:
        """Whether a batch's rows are in the journal; some may be missing at its end, but none may differ."""
        content = written.read(commit.end - kept.end)
        if len(content) < commit.end - kept.end:
            return False
        if digest(content) != commit.content:
            raise UsageError(
                f"{self._output} was changed after row {kept.rows:,} by something else, so it cannot be "
                "added to; choose another -o, or --overwrite it"
            )
        return True

    def begin(self, kept: Kept) -> None:
        """Starts to record, after the batches that are kept."""
        os.ftruncate(self._fd, kept.place)
        if not kept.place:
            self._append(json.dumps({"attnsuite ledger": _FORMAT, "command": self._command}) + "\n")

    def record(self, entry: Commit | Part) -> None:
        """Records a finished batch, whose rows must have been written, or a part that holds all before it."""
        self._append(json.dumps(asdict(entry)) + "\n")

    def finish(self) -> None:
        """Records that there is no more to do; a run that finds more takes this back."""
        self._append(_FINISHED.decode() + "\n")

    def clear(self) -> None:
        """Forgets the command, too."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Lets other runs have the output. A ledger in which nothing was recorded goes."""
        if not os.fstat(self._fd).st_size:
            os.unlink(self.path)
        os.close(self._fd)

    def _append(self, text: str) -> None:
        left = text.encode()
        while left:
            left = left[os.write(self._fd, left) :]

    def _entries(self) -> Iterator[tuple[int, Commit | Part]]:
        """Batches and parts, with the length of the ledger after each."""
        lines = self._lines()
        place = len(next(lines, b"")) + 1
        for line in lines:
            try:
                fields = json.loads(line)
                entry = Part(**fields) if "part" in fields else Commit(**fields)
            except (ValueError, TypeError):
                return  # damaged: nothing after it counts
            place += len(line) + 1
            yield place, entry

    def _lines(self) -> Iterator[bytes]:
        """Complete lines. Read through the one handle there is: closing a second one would drop the lock."""
        place, tail = 0, b""
        while piece := os.pread(self._fd, _PIECE, place):
            place += len(piece)
            *lines, tail = (tail + piece).split(b"\n")
            yield from lines
