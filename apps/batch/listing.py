"""Names in folders, in order, in constant memory.

A folder may hold more names than fit comfortably in memory, yet rows must come in the same order every time. Names
are therefore sorted in chunks; only a folder with more than one chunk spills them to a temporary file and merges.
"""

from __future__ import annotations

import fnmatch
import heapq
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import BinaryIO

__all__ = ["Found", "expand_glob", "glob_matches", "has_glob", "sorted_names", "walk"]

_CHUNK = 20_000
_Names = Iterator[tuple[bytes, bool]]


@dataclass(frozen=True)
class Found:
    """A path met while walking: a file, or a folder that could not be walked.

    Attributes:
        path: The path, with undecodable bytes as surrogate escapes.
        error: Why a folder could not be walked; None for a file.
        stamp: Changes when the content may have changed, where the listing told; None where the file can be asked.
    """

    path: str
    error: str | None = None
    stamp: str | None = None


def sorted_names(folder: str, chunk: int = _CHUNK) -> _Names:
    """Lists a folder in byte order of the names.

    Args:
        folder: The folder.
        chunk: How many names are held in memory at once.

    Yields:
        Name and whether it is a folder (a link to a folder is one, a broken link is not).

    Raises:
        OSError: The folder cannot be read.
    """
    with os.scandir(os.fsencode(folder)) as entries:
        records = ((entry.name, _is_folder(entry)) for entry in entries)
        first = sorted(islice(records, chunk))
        more = next(records, None)
        spilled = None if more is None else _spill_sorted(first, chain([more], records), chunk)
    if spilled is None:
        yield from first
        return
    del first
    file, runs = spilled
    with file:
        yield from heapq.merge(*(_read_run(file, start, end) for start, end in runs))


def walk(top: str, *, recursive: bool, wanted: Callable[[bytes], bool]) -> Iterator[Found]:
    """Walks a folder depth first, every level in order of the names.

    Links to folders are followed, except one that leads back to a folder that is being walked.

    Args:
        top: The folder.
        recursive: Whether folders inside are walked too.
        wanted: Tells by its name whether a file is wanted.

    Yields:
        Files wanted, and folders that could not be walked, with the reason.
    """
    stack: list[tuple[str, tuple[int, int], _Names]] = []  # a path may be deeper than Python's own stack

    def enter(folder: str) -> Iterator[Found]:
        try:
            status = os.stat(folder)
            os.close(os.open(folder, os.O_RDONLY))  # the listing opens lazily; its error has to come now
        except OSError as error:
            yield Found(folder, _reason(error))
            return
        identity = (status.st_dev, status.st_ino)
        if above := next((path for path, key, _ in stack if key == identity), None):
            yield Found(folder, f"symbolic link loop: leads back to {above}")
        else:
            stack.append((folder, identity, sorted_names(folder)))

    yield from enter(top)
    while stack:
        folder, _, names = stack[-1]
        try:
            name, is_folder = next(names)
        except StopIteration:
            stack.pop()
            continue
        except OSError as error:  # the listing broke off
            stack.pop()
            yield Found(folder, _reason(error))
            continue
        path = os.path.join(folder, os.fsdecode(name))
        if is_folder and recursive:
            yield from enter(path)
        elif not is_folder and wanted(name):
            yield Found(path)


def has_glob(pattern: str) -> bool:
    """Whether a path has `*`, `?` or `[…]` in it."""
    return re.search(r"[*?[]", pattern) is not None


def expand_glob(pattern: str) -> Iterator[Found]:
    """Expands a shell pattern lazily and in order; `**` stands for any number of folders.

    Args:
        pattern: A path with wildcards. Names that begin with a dot only match a part that does.

    Yields:
        Files and folders that match, and folders on the way that could not be listed.
    """
    parts = pattern.split(os.sep)
    fixed = next(index for index, part in enumerate(parts) if has_glob(part))
    base = os.sep.join(parts[:fixed]) or (os.sep if fixed else "")
    yield from _expand(base, [part for part in parts[fixed:] if part])


def glob_matches(path: str, pattern: str) -> bool:
    """Whether `expand_glob(pattern)` would come upon this path; both are absolute."""
    return _parts_match(path.split(os.sep), pattern.split(os.sep))


def _parts_match(parts: list[str], wanted: list[str]) -> bool:
    if not wanted or not parts:
        return not wanted and not parts
    if wanted[0] == "**":
        return _parts_match(parts, wanted[1:]) or _parts_match(parts[1:], wanted)
    is_hidden = parts[0].startswith(".") and not wanted[0].startswith(".")
    return not is_hidden and fnmatch.fnmatchcase(parts[0], wanted[0]) and _parts_match(parts[1:], wanted[1:])


def _expand(base: str, parts: list[str]) -> Iterator[Found]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        if not rest:
            yield Found(base or os.curdir)
            return
        yield from _expand(base, rest)
    try:
        for raw, is_folder in sorted_names(base or os.curdir):
            name = os.fsdecode(raw)
            path = os.path.join(base, name)
            if name.startswith(".") and not part.startswith("."):
                continue
            if part == "**":
                if is_folder and not os.path.islink(path):
                    yield from _expand(path, parts)
            elif fnmatch.fnmatchcase(name, part):
                if not rest:
                    yield Found(path)
                elif is_folder:
                    yield from _expand(path, rest)
    except FileNotFoundError:
        return  # nothing there is nothing that matches
    except OSError as error:
        yield Found(base, _reason(error))


def _reason(error: OSError) -> str:
    return f"cannot list this folder: {error.strerror or error}"


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: reading it as a file will tell
        return False


def _spill_sorted(
    first: list[tuple[bytes, bool]], records: _Names, chunk: int
) -> tuple[BinaryIO, list[tuple[int, int]]]:
    """Writes sorted chunks to a temporary file; returns it with where each chunk lies."""
    file = tempfile.TemporaryFile()
    runs = []
    block = first
    while block:
        start = file.tell()
        file.write(b"".join(name + (b"/\0" if is_folder else b".\0") for name, is_folder in block))
        runs.append((start, file.tell()))
        block = sorted(islice(records, chunk))
    file.flush()
    return file, runs


def _read_run(file: BinaryIO, start: int, end: int) -> _Names:
    """Reads one chunk back in small pieces; all chunks share the file, so each keeps its own place."""
    tail = b""
    while start < end:
        piece = os.pread(file.fileno(), min(1 << 14, end - start), start)
        start += len(piece)
        *records, tail = (tail + piece).split(b"\0")
        for record in records:
            yield record[:-1], record.endswith(b"/")
