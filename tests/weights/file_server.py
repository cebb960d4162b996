"""A real HTTP server on the loopback that can be told to misbehave in the ways that servers do."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["FileServer"]


class FileServer:
    """Serves `content` under every path.

    Attributes:
        etag: Sent and honoured in `If-Range`; None sends none.
        statuses: Answered to the next requests, one each, instead of the file.
        cuts: The next answers break off after so many bytes, one each.
        honours_range: Whether ranges are served.
        states_length: Whether answers carry a Content-Length.
        content_type: Sent with the file.
        pace: Seconds of rest after each 64 KB.
        length_claimed: A Content-Length to lie with.
        log: One `(status, first byte, bytes to be sent)` per answer.
    """

    def __init__(self) -> None:
        self.content = b""
        self.etag: str | None = '"1"'
        self.statuses: list[int] = []
        self.cuts: list[int] = []
        self.honours_range = True
        self.states_length = True
        self.length_claimed: int | None = None
        self.content_type = "application/octet-stream"
        self.pace = 0.0
        self.log: list[tuple[int, int, int]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.statuses:
            status = self.statuses.pop(0)
            self.log.append((status, 0, 0))
            handler.send_error(status)
            return
        start = self._range_start(handler)
        if start is not None and start >= len(self.content):
            self.log.append((416, start, 0))
            handler.send_error(416)
            return
        status = 200 if start is None else 206
        whole = self.content[start or 0 :]
        body = whole[: self.cuts.pop(0)] if self.cuts else whole
        self.log.append((status, start or 0, len(body)))
        handler.send_response(status)
        if start is not None:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.states_length:
            handler.send_header("Content-Length", str(self.length_claimed or len(whole)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.send_header("Content-Type", self.content_type)
        handler.end_headers()
        self._send(handler, body)
        handler.close_connection = True

    def _range_start(self, handler: BaseHTTPRequestHandler) -> int | None:
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if asked is None or not self.honours_range or (condition is not None and condition != self.etag):
            return None
        return int(asked.group(1))

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        try:
            for start in range(0, len(body), 65536):
                handler.wfile.write(body[start : start + 65536])
                handler.wfile.flush()
                time.sleep(self.pace)
        except OSError:
            pass  # the client has gone, which some tests are about
