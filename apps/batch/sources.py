"""From the arguments of a command to a lazy, ordered stream of image sources.

A source is a file, a member of a tar archive, a row of a Parquet file, or something that was found but cannot be read
(a folder without permission, a link that leads nowhere): that too becomes a row. No list of all sources is ever made.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import UsageError, in_one_line
from .decode import image_suffixes
from .listing import Found, expand_glob, glob_matches, has_glob, walk
from .remote import find, is_remote, local_path, open_file
from .tables import count_rows

if TYPE_CHECKING:
    from .shards import Shard

__all__ = ["Inputs", "Source", "decode_path", "encode_path"]

_PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One input of a run, that is: one row of its output.

    Attributes:
        path: The file, with undecodable bytes as surrogate escapes, or its address.
        member: Name inside the tar archive `path`, or row of the Parquet file; None for a file of its own.
        offset: Where the member's bytes begin in the archive; the row.
        size: How many bytes the member has; -1 if unknown.
        stamp: Changes when the content may have changed; empty if unknown.
        error: Why this source cannot be read, if that is known already.
    """

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0
    stamp: str = ""
    error: str | None = None

    @property
    def name(self) -> str:
        """What rows call this source: the path, for a member of an archive `archive.tar::member`."""
        return self.path if self.member is None else f"{self.path}::{self.member}"

    @property
    def key(self) -> str:
        """Text that is equal for two sources exactly if one stands for the other, content included."""
        return "\0".join((self.name, self.stamp, self.error or ""))


def encode_path(path: str) -> str:
    r"""Makes a path printable on one line and valid Unicode, reversibly.

    A backslash becomes `\\`, a control character or a byte that is not UTF-8 becomes `\xNN`; all else stays.
    """
    if path.isprintable() and "\\" not in path:
        return path
    return re.sub(r"[\\\x00-\x1f\x7f\udc80-\udcff]", _escape, path)


def decode_path(text: str) -> str:
    """Gives back the path that `encode_path` was given, ready for `open`."""
    return re.sub(r"\\(\\|x([0-9a-f]{2}))", _unescape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    return "\\\\" if character == "\\" else f"\\x{ord(character) & 0xFF:02x}"


def _unescape(match: re.Match[str]) -> str:
    if match[1] == "\\":
        return "\\"
    code = int(match[2], 16)
    return chr(code) if code < 0x80 else chr(0xDC00 + code)


@dataclass
class Inputs:
    """The inputs of a run as the user named them; iterating yields every source once, always in the same order.

    Attributes:
        arguments: Files, folders, shell patterns and tar archives.
        recursive: Whether folders inside folders are searched.
        pattern: Shell pattern that names inside folders and archives must match; None takes image suffixes.
        limit: Stop after so many sources.
        shard: Take the files of one of several parts of the run; None for all.
        note: Told about arguments that repeat others.
    """

    arguments: Sequence[str]
    recursive: bool = True
    pattern: str | None = None
    limit: int | None = None
    shard: Shard | None = None
    note: Callable[[str], None] = field(default=lambda message: None)
    _noted: set[str] = field(default_factory=set, init=False)

    def check(self) -> None:
        """Tells before any long work whether there is something to read.

        Raises:
            UsageError: An argument does not exist or is a compressed archive, or no argument leads to an image.
        """
        for argument in map(local_path, self.arguments):
            if is_remote(argument):
                continue  # listing it will tell
            if not os.path.lexists(argument):
                if not has_glob(argument):
                    raise UsageError(f"input {encode_path(argument)!r} does not exist")
                if next(iter(expand_glob(argument)), None) is None:
                    raise UsageError(f"no file matches {encode_path(argument)!r}")
            elif _PACKED.search(argument):
                raise UsageError(
                    f"{encode_path(argument)!r} is a compressed archive, which cannot be read at random: unpack it to "
                    "a plain .tar or to a folder first"
                )
        if next(iter(replace(self, shard=None)), None) is None:  # a shard may well be empty
            asked = f"names like {self.pattern!r}" if self.pattern else "image suffixes such as .jpg, .png or .webp"
            raise UsageError(
                f"found no images in {', '.join(map(encode_path, self.arguments))} ({asked}); "
                "choose others with --glob 'PATTERN'" + ("" if self.recursive else " or search deeper with --recursive")
            )

    @property
    def root(self) -> str:
        """The deepest folder that holds every input, for names of outputs that mirror the inputs."""
        folders = []
        for argument in map(local_path, self.arguments):
            if not os.path.lexists(argument) and has_glob(argument):
                argument = os.path.dirname(re.split(r"[*?[]", argument)[0])
            elif not os.path.isdir(argument):
                argument = os.path.dirname(argument)
            folders.append(os.path.abspath(argument or os.curdir))
        return os.path.commonpath(folders)

    def __iter__(self) -> Iterator[Source]:
        count = 0
        for place, found in enumerate(self._found()):
            for source in self._sources(found) if self._takes(place) else ():
                if self.limit is not None and count >= self.limit:
                    return
                count += 1
                yield source

    def _takes(self, place: int) -> bool:
        """Whether what stands at this place of the listing is for this run."""
        return self.shard is None or self.shard.takes(place)

    def _found(self) -> Iterator[Found]:
        """Files and failed folders of all arguments; what an earlier argument covers is left out."""
        earlier = _Covered(self.recursive, self._wanted)
        for argument in map(local_path, self.arguments):
            if is_remote(argument):
                yield from find(argument, recursive=self.recursive, wanted=self._wanted)
                continue
            repeats = 0
            is_pattern = not os.path.lexists(argument) and has_glob(argument)
            for top in expand_glob(argument) if is_pattern else [Found(argument)]:
                for found in self._walk(top):
                    if earlier.has(found):
                        repeats += 1
                    else:
                        yield found
                if not is_pattern or os.path.isdir(top.path):
                    earlier.add(top.path)
            if is_pattern:
                earlier.add_pattern(argument)
            if repeats and argument not in self._noted:
                self._noted.add(argument)
                self.note(f"{encode_path(argument)}: {repeats:,} inputs were named before and are processed once")

    def _walk(self, top: Found) -> Iterator[Found]:
        if top.error is None and os.path.isdir(top.path):
            yield from walk(top.path, recursive=self.recursive, wanted=self._wanted)
        else:
            yield top

    def _wanted(self, name: bytes) -> bool:
        text = os.fsdecode(name)
        return text.lower().endswith(".tar") or self._is_image(text)

    def _is_image(self, name: str) -> bool:
        if self.pattern is not None:
            return fnmatch.fnmatchcase(name, self.pattern)
        return os.path.splitext(name)[1].lower() in image_suffixes()

    def _sources(self, found: Found) -> Iterator[Source]:
        if found.error is not None:
            yield Source(found.path, error=found.error)
            return
        stamp = found.stamp
        if stamp is None:
            try:
                status = os.stat(found.path)
            except OSError as error:
                yield Source(found.path, error=_unreadable(found.path, error))
                return
            if not stat.S_ISREG(status.st_mode):
                yield Source(found.path, error="not a regular file")
                return
            stamp = f"{status.st_size}:{status.st_mtime_ns}"
        if found.path.lower().endswith(".tar"):
            yield from self._members(found.path, stamp)
        elif found.path.lower().endswith(".parquet"):
            yield from self._rows(found.path, stamp)
        else:
            yield Source(found.path, stamp=stamp)

    def _rows(self, path: str, stamp: str) -> Iterator[Source]:
        """Pictures in a Parquet file, a row each."""
        try:
            count = count_rows(path)
        except Exception as error:  # pyarrow and servers pass on errors of many kinds
            yield Source(path, stamp=stamp, error=f"cannot read this Parquet file: {in_one_line(error)}")
            return
        for row in range(count):
            yield Source(path, str(row), row, -1, stamp)

    def _members(self, path: str, stamp: str) -> Iterator[Source]:
        """Images in a tar archive, addressed by their place in it so that any process can read them."""
        try:
            with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - else it remembers all members passed
                    if member.isdir() or not self._is_image(os.path.basename(member.name)):
                        continue
                    if member.isreg() and not member.issparse():
                        yield Source(path, member.name, member.offset_data, member.size, stamp)
                    else:
                        yield Source(path, member.name, stamp=stamp, error="a link or special file in an archive")
                file.seek(archive.offset)
                if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"damaged at byte {archive.offset:,}")
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Source(path, stamp=stamp, error=f"cannot read this archive (to its end): {in_one_line(error)}")


class _Covered:
    """Which files the arguments so far have led to, at the cost of one entry an argument."""

    def __init__(self, recursive: bool, wanted: Callable[[bytes], bool]) -> None:
        self._recursive = recursive
        self._wanted = wanted
        self._files: set[str] = set()
        self._folders: set[str] = set()
        self._patterns: list[str] = []

    def add(self, path: str) -> None:
        if os.path.isdir(path):
            self._folders.add(os.path.realpath(path))
        else:
            self._files.add(_resolved(path))

    def add_pattern(self, pattern: str) -> None:
        self._patterns.append(os.path.abspath(pattern))

    def has(self, found: Found) -> bool:
        if not (self._files or self._folders or self._patterns):
            return False
        path = _resolved(found.path)
        if path in self._files or any(glob_matches(path, pattern) for pattern in self._patterns):
            return True
        if found.error is None and not self._wanted(os.fsencode(os.path.basename(path))):
            return False
        folder = os.path.dirname(path)
        while self._recursive and folder not in self._folders and folder != os.path.dirname(folder):
            folder = os.path.dirname(folder)
        return folder in self._folders or path in self._folders


def _resolved(path: str) -> str:
    """The path with its folder resolved; the last part is not: a link is an input under its own name."""
    return os.path.join(os.path.realpath(os.path.dirname(path) or os.curdir), os.path.basename(path))


def _unreadable(path: str, error: OSError) -> str:
    if os.path.islink(path):
        target = encode_path(os.readlink(path))
        reason = "symbolic link loop" if error.errno == errno.ELOOP else "broken symbolic link"
        return f"{reason}: leads to {target}"
    return f"cannot open this file: {error.strerror or error}"
