"""Downloading one file over HTTP so that it arrives whole or not at all.

Bytes stream into a `.part` file. A cut connection is taken up where it broke, in the same call or in a later process:
a note beside the `.part` file keeps what identifies the version on the server (ETag, Last-Modified, length), and only
the rest of that same version is asked for. A server that ignores the request for a range simply starts over.
"""

from __future__ import annotations

import errno
import http.client
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .manifest import WeightsError

__all__ = ["Progress", "download"]

_logger = logging.getLogger(__name__)

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes on disk so far and the bytes in all (None while unknown)."""

_CHUNK = 1 << 16
_TIMEOUT_SECONDS = 30.0  # without a byte arriving
_ATTEMPTS = 4  # in a row, none of which brought a byte
_BACKOFF_SECONDS = 1.0  # before the second attempt; doubles from there
_LONGEST_WAIT_SECONDS = 30.0
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class _Version:
    """What tells one version of the file on the server from another."""

    url: str
    etag: str | None = None
    modified: str | None = None
    total: int | None = None

    @property
    def validator(self) -> str | None:
        """What `If-Range` accepts: a strong ETag, else a date."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.modified


class _Interrupted(Exception):
    """The transfer broke off in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _Restart(_Interrupted):
    """What was kept of the file belongs to another version; the next attempt begins at the first byte."""


def download(url: str, part: Path, progress: Progress | None = None) -> None:
    """Brings the whole file at `url` into `part`, going on from the bytes that are already there.

    Args:
        url: `http://`, `https://` or `file://`.
        part: File to fill. It stays when the transfer fails, so that the next call can go on from it.
        progress: Told about every chunk.

    Raises:
        WeightsError: The server refuses, sends a web page, keeps cutting the connection or does not answer; or the
            disk is full.
    """
    fruitless = 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part, progress)
            _note(part).unlink(missing_ok=True)
            return
        except _Interrupted as error:
            if isinstance(error, _Restart):
                part.unlink(missing_ok=True)
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless >= _ATTEMPTS:
                kept = f"; {_size(part)} bytes are kept and the next try goes on from there" if _size(part) else ""
                raise WeightsError(f"{url}: {error}, {fruitless} times in a row{kept}") from error
            wait = max(_BACKOFF_SECONDS * 2 ** max(fruitless - 1, 0), error.wait)
            _logger.info("%s: %s; next try in %.0f s", url, error, wait)
            time.sleep(min(wait, _LONGEST_WAIT_SECONDS))


def _transfer(url: str, part: Path, progress: Progress | None) -> None:
    """One attempt."""
    held = _size(part)
    version = _read_note(part, url) if held else None
    request = urllib.request.Request(url, headers={"User-Agent": "attnsuite", "Accept-Encoding": "identity"})
    if held and version is not None:
        request.add_header("Range", f"bytes={held}-")
        if version.validator:
            request.add_header("If-Range", version.validator)
    try:
        with closing(urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)) as response:
            offset, offered = _where_it_starts(response, url, held, version)
            _refuse_web_page(response, url)
            _check_space(part, offset, offered.total)
            if not offset:
                part.unlink(missing_ok=True)  # before the note says anything new: a kill may come between
            _write_note(part, offered)
            _stream(response, part, offset, offered.total, progress)
    except urllib.error.HTTPError as error:
        _refused(error, url, part, version)
    except urllib.error.URLError as error:
        if isinstance(error.reason, FileNotFoundError):
            raise WeightsError(f"{url}: no such file") from error
        raise _Interrupted(f"no connection ({error.reason})") from error
    except (http.client.HTTPException, OSError) as error:  # ours, of the disk, have become WeightsErrors by now
        raise _Interrupted(f"the connection broke ({type(error).__name__})") from error


def _where_it_starts(response: Any, url: str, held: int, version: _Version | None) -> tuple[int, _Version]:
    """Reads from the answer at which byte it begins and which version of the file it belongs to."""
    length = response.headers.get("Content-Length")
    offset, total = 0, int(length) if length and length.isdecimal() else None
    if getattr(response, "status", None) == http.HTTPStatus.PARTIAL_CONTENT:
        offset, total = _content_range(response.headers.get("Content-Range", ""))
    offered = _Version(url, response.headers.get("ETag"), response.headers.get("Last-Modified"), total)
    if offset and (offset != held or version is None or not _same(version, offered)):
        # The rest of another version would make a file that never existed.
        raise _Restart("the file on the server has changed")
    return offset, offered


def _same(ours: _Version, offered: _Version) -> bool:
    if ours.etag and offered.etag and ours.etag != offered.etag:
        return False
    return ours.total == offered.total


def _content_range(header: str) -> tuple[int, int | None]:
    """Parses `bytes 100-199/200`."""
    span, _, total = header.removeprefix("bytes").strip().partition("/")
    start = span.partition("-")[0]
    if not start.isdecimal():
        raise _Interrupted(f"the server sent an unreadable Content-Range ({header!r})")
    return int(start), int(total) if total.isdecimal() else None


def _stream(response: Any, part: Path, offset: int, total: int | None, progress: Progress | None) -> None:
    with _open_at(part, offset) as file:
        done = offset
        while chunk := response.read(_CHUNK):
            try:
                file.write(chunk)
            except OSError as error:
                raise _cannot_write(part, error) from error
            done += len(chunk)
            if progress is not None:
                progress(done, total)
        try:
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise _cannot_write(part, error) from error
    if total is not None and done < total:
        raise _Interrupted(f"the connection was cut after {done} of {total} bytes")


def _open_at(part: Path, offset: int) -> BinaryIO:
    try:
        file = open(part, "r+b" if offset else "wb")
        file.truncate(offset)
        file.seek(offset)
        return file
    except OSError as error:
        raise _cannot_write(part, error) from error


def _refused(error: urllib.error.HTTPError, url: str, part: Path, version: _Version | None) -> None:
    """Sorts an HTTP error into: done already, try again, or final. Returns only where the file is whole."""
    error.close()
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        if version is not None and version.total == _size(part):
            return  # killed between the last byte and the renaming
        raise _Restart("the server does not have the range asked for")
    if error.code in _TEMPORARY:
        wait = error.headers.get("Retry-After", "") if error.headers else ""
        raise _Interrupted(f"the server answered {error.code} {error.reason}", float(wait) if wait.isdecimal() else 0.0)
    raise WeightsError(f"{url}: the server answered {error.code} {error.reason}") from error


def _refuse_web_page(response: Any, url: str) -> None:
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise WeightsError(f"{url}: the server sent a web page instead of a file; the link is probably dead")


def _check_space(part: Path, offset: int, total: int | None) -> None:
    """Fails before the transfer, not at its end."""
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - offset > free:
        raise WeightsError(
            f"{part.parent}: {(total - offset) / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free; "
            "make room or point ATTNSUITE_HOME at a larger disk"
        )


def _cannot_write(path: Path, error: OSError) -> WeightsError:
    hint = "make room or point ATTNSUITE_HOME at a larger disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "point ATTNSUITE_HOME at a folder you may write to"
    return WeightsError(f"cannot write {path}: {error.strerror}; {hint}")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _write_note(part: Path, version: _Version) -> None:
    try:
        _note(part).write_text(json.dumps(asdict(version)), encoding="utf-8")
    except OSError as error:
        raise _cannot_write(_note(part), error) from error


def _read_note(part: Path, url: str) -> _Version | None:
    """What the kept bytes belong to; None if that is unknown, and then they are not used."""
    try:
        version = _Version(**json.loads(_note(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    recognisable = version.validator is not None or version.total is not None
    return version if version.url == url and recognisable else None
