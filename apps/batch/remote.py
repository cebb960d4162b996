"""Files that are not on this machine's disks, by fsspec: buckets, web servers, another machine's folders.

An address is `protocol://…`; which protocols there are depends on the packages installed (`s3fs` for `s3://`, `gcsfs`
for `gs://`). `file://` is the path behind it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from ..errors import UsageError, in_one_line
from .listing import Found, has_glob

__all__ = ["find", "is_remote", "local_path", "open_file", "read_range"]

# What servers call the moment or the content that a file was last changed by; the first that is there counts.
_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "updated", "created")

_LARGE = 1 << 20


def is_remote(path: str) -> bool:
    """Whether this is an address and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def local_path(argument: str) -> str:
    """The path behind `file://…`; all else as it is."""
    return re.sub(r"^(file|local)://", "", argument)


def find(address: str, *, recursive: bool, wanted: Callable[[bytes], bool]) -> Iterator[Found]:
    """Files at an address, in order of their names: itself, what matches it as a pattern, or what is in the folder.

    Args:
        address: Of a file or a folder, or a pattern.
        recursive: Whether folders inside are walked, too.
        wanted: Tells by its name whether a file in a folder is wanted.

    Yields:
        Files with their stamp, and folders that could not be listed, with the reason.

    Raises:
        UsageError: Nothing of that kind can be reached.
    """
    fs, path = _filesystem(address)
    try:
        if has_glob(path):
            tops = [info for _, info in sorted(fs.glob(path, detail=True).items())]
        else:
            tops = [fs.info(path)]
    except Exception as error:  # each protocol has errors of its own
        raise UsageError(f"input {address!r} cannot be reached: {in_one_line(error)}") from error
    if not tops:
        raise UsageError(f"no file matches {address!r}")
    for info in tops:
        if info["type"] == "directory":
            yield from _walk(fs, info["name"], recursive, wanted)
        else:
            yield _found(fs, info)


def open_file(path: str) -> BinaryIO:
    """Opens a file, here or at an address, for reading at random."""
    if not is_remote(path):
        return _File(io.FileIO(path))
    fs, there = _filesystem(path)
    return cast(BinaryIO, fs.open(there, "rb"))


class _File(io.BufferedReader):
    """A file that makes room for no more than it has: headers that lie ask for gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGE:
            size = max(0, min(size, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Some bytes of a file, here or at an address; fewer if it ends before."""
    if is_remote(path):
        fs, there = _filesystem(path)
        return fs.cat_file(there, offset, offset + size)
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _walk(fs: Any, folder: str, recursive: bool, wanted: Callable[[bytes], bool]) -> Iterator[Found]:
    """Depth first, one level in memory at a time; servers tell a folder's names only all at once."""
    try:
        level = sorted(fs.ls(folder, detail=True), key=lambda info: info["name"])
    except Exception as error:
        yield Found(fs.unstrip_protocol(folder), f"cannot list this folder: {in_one_line(error)}")
        return
    for info in level:
        name = info["name"].rstrip("/")
        if name == folder.rstrip("/"):
            continue  # some servers name the folder itself
        if info["type"] == "directory":
            if recursive:
                yield from _walk(fs, name, recursive, wanted)
        elif wanted(name.rpartition("/")[2].encode("utf-8", "surrogateescape")):
            yield _found(fs, info)


def _found(fs: Any, info: dict[str, Any]) -> Found:
    mark = next((info[name] for name in _MARKS if info.get(name)), "")
    return Found(fs.unstrip_protocol(info["name"]), stamp=f"{info.get('size')}:{mark}")


def _filesystem(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{address} cannot be opened: {in_one_line(error)}") from error
