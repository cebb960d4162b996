"""What stands before the routes of Gradio: which are open, to whom, how much they take, and which files are ours."""

from __future__ import annotations

import base64
import hmac
import os
import re
import secrets
from http.cookies import SimpleCookie
from typing import Any

from gradio.route_utils import API_PREFIX
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UsageError

__all__ = ["Gate", "check_files", "within"]

# Of Gradio, and of no use here: other people's servers, recordings, editing the program, links that are kept as files.
_CLOSED = (
    "/monitoring",
    f"{API_PREFIX}/custom_component/",
    f"{API_PREFIX}/deep_link",
    f"{API_PREFIX}/dev/",
    f"{API_PREFIX}/process_recording",
    f"{API_PREFIX}/proxy=",
    f"{API_PREFIX}/run-history",
    f"{API_PREFIX}/runs",
    f"{API_PREFIX}/stream/",
    f"{API_PREFIX}/vibe-edit",
)
# What a browser needs to show the form for user and password. None of it says anything of this server, except that
# `startup-events` starts its queue, which has happened long before.
_FOR_ALL = ("/assets/", "/static/", "/svelte/")
_FOR_ALL_EXACT = (
    "/favicon.ico",
    "/login",
    "/login/",
    "/logout",
    "/manifest.json",
    "/robots.txt",
    "/theme.css",
    f"{API_PREFIX}/startup-events",
    f"{API_PREFIX}/theme.css",
)
_FILES = (f"{API_PREFIX}/file=", f"{API_PREFIX}/file/")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|\\\\")
_API_IN_PAGE = re.compile(rb"(window\.gradio_api_info = ).*?(;</script>)", re.DOTALL)
_SMALL_MEGABYTES = 1  # settings, texts and tables
_DRAINED_MEGABYTES = 200


def within(path: str, folder: str) -> bool:
    """Whether a path leads, links followed, to something in a folder; of an address or a broken path: no."""
    if _ADDRESS.match(path):
        return False
    try:
        real = os.path.realpath(path)
    except ValueError:  # a null byte
        return False
    return real.startswith(os.path.realpath(folder) + os.sep)


def check_files(data: Any, folder: str) -> None:
    """Refuses inputs that name a file which nobody uploaded: an address to fetch, or a file of this machine.

    Args:
        data: Inputs of an event, as they were sent.
        folder: Where uploads are.

    Raises:
        UsageError: There is one.
    """
    if isinstance(data, dict):
        path = data.get("path")
        # with or without the mark by which Gradio knows a file: some of its components do without
        if isinstance(path, str) and not within(path, folder):
            raise UsageError(
                "files are taken as uploads only, not by address nor by a path of the server: upload it first"
            )
        data = list(data.values())
    if isinstance(data, list):
        for value in data:
            check_files(value, folder)


class Gate:
    """Middleware before all routes.

    Args:
        app: What comes behind it.
        folder: The only one from which files are served.
        megabytes: The largest upload.
        auth: User and password, where visitors have to log in.
        pages: Paths of the pages, which show the form to those who have not.
    """

    def __init__(
        self,
        app: ASGIApp,
        folder: str,
        megabytes: int,
        auth: tuple[str, str] | None = None,
        pages: tuple[str, ...] = ("/",),
    ) -> None:
        self._app = app
        self._folder = folder
        self._megabytes = megabytes
        self._auth = auth
        self._pages = pages
        self._token = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope)
        refusal = self._refusal(scope, limit)
        if refusal is not None:
            await _drain(receive)
            await refusal(scope, receive, send)
        elif self._auth is not None and scope["path"] in self._pages and not self._knows(scope):
            await self._app(scope, receive, _without_api(send))
        else:
            await _limited(self._app, limit, scope, receive, send)

    def _refusal(self, scope: Scope, limit: int) -> JSONResponse | None:
        path: str = scope["path"]
        if self._auth is not None and not self._for_all(path) and not self._knows(scope):
            return _says(401, "log in first: this server asks for a user and a password")
        if path.startswith(_CLOSED):
            return _says(404, "this server has no such thing")
        for prefix in _FILES:
            if path.startswith(prefix) and not within(path.removeprefix(prefix), self._folder):
                return _says(403, "this is no file that the demo hands out")
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            return _too_large(limit)
        return None

    def _limit(self, scope: Scope) -> int:
        """How many bytes a request may have: uploads as many as were promised, and a little for what wraps them."""
        path: str = scope["path"]
        megabytes = _SMALL_MEGABYTES
        if path.startswith(f"{API_PREFIX}/upload"):
            megabytes = self._megabytes
        elif path.startswith(f"{API_PREFIX}/mcp"):  # agents send pictures within JSON, four bytes for three
            megabytes = self._megabytes * 4 // 3 + 1
        return (megabytes + 1) * 1_000_000

    def _for_all(self, path: str) -> bool:
        return path.startswith(_FOR_ALL) or path in _FOR_ALL_EXACT or path in self._pages

    def _knows(self, scope: Scope) -> bool:
        """Whether the visitor has logged in, or sends user and password along (agents and scripts do).

        Those who send them get the cookie that a login would have given, as the routes behind look for that.
        """
        assert self._auth is not None
        headers = Headers(scope=scope)
        app = scope["app"]
        cookies = SimpleCookie()
        for header in headers.getlist("cookie"):
            cookies.load(header)
        for name in (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}"):
            if name in cookies and cookies[name].value in app.tokens:
                return True
        if not _basic(headers.get("authorization", ""), self._auth):
            return False
        app.tokens[self._token] = self._auth[0]
        cookie = f"access-token-unsecure-{app.cookie_id}={self._token}".encode("latin-1")
        scope["headers"] = [*((k, v) for k, v in scope["headers"] if k != b"cookie"), (b"cookie", cookie)]
        return True


def _basic(header: str, auth: tuple[str, str]) -> bool:
    """Whether a header says, by HTTP's basic scheme, the right user and password."""
    scheme, _, encoded = header.partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True)
    except ValueError:
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(given, ":".join(auth).encode())


def _says(status: int, words: str) -> JSONResponse:
    # Gradio's page shows `error` or `detail`, depending on what it asked for
    return JSONResponse({"detail": words, "error": words}, status)


def _too_large(limit: int) -> JSONResponse:
    return _says(413, f"this is too large: at most {limit // 1_000_000 - 1} MB are taken")


async def _drain(receive: Receive) -> None:
    """Reads what a refused visitor still sends: cut off in the middle, a browser would not show the answer."""
    left = _DRAINED_MEGABYTES * 1e6
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


class _TooLarge(Exception):
    pass


async def _limited(app: ASGIApp, limit: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs an app that gets no more than so many bytes, whatever the request says of its length."""
    got = 0
    begun = more = False

    async def counted() -> Message:
        nonlocal got, more
        message = await receive()
        got += len(message.get("body", b""))
        more = message.get("more_body", False)
        if got > limit:
            raise _TooLarge
        return message

    async def noted(message: Message) -> None:
        nonlocal begun
        if got <= limit or begun:  # else what is read from here on is an answer to the exception
            begun = True
            await send(message)

    try:
        await app(scope, counted, noted)
    except _TooLarge:
        pass
    except Exception as error:
        # of a request that Gradio cannot read; handlers run behind the queue, and what goes wrong there is said there
        if begun or scope["method"] != "POST":
            raise
        words = f"this request is not what this takes: {type(error).__name__} {str(error)[:200]}"
        await _says(400, words)(scope, receive, send)
        return
    if got > limit and not begun:
        if more:
            await _drain(receive)
        await _too_large(limit)(scope, receive, send)


def _without_api(send: Send) -> Send:
    """The page for those who have not logged in names no part of the API; Gradio writes all of it there."""
    start: Message = {}
    parts: list[bytes] = []

    async def passed(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = _API_IN_PAGE.sub(rb"\1{}\2", b"".join(parts))
        headers = [(k, v) for k, v in start["headers"] if k != b"content-length"]
        # to HEAD the length is said, and nothing sent
        length = [(b"content-length", str(len(body)).encode())] if body else []
        await send({**start, "headers": headers + length})
        await send({"type": "http.response.body", "body": body})

    return passed
