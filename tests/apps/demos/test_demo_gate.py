"""What the demos' server lets through, tried on a real one: files, addresses, sizes, and logging in."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

from gradio.routes import App

import apps.demos.server as server_module
from apps.demos.gate import check_files, within
from apps.demos.host import Settings
from apps.demos.server import Serving
from apps.errors import UsageError

AUTH = ("ann", "päss:word")
# What anybody may have, and why: the form (pages, scripts, styles), the login itself, and that the server has begun.
FOR_ALL = {
    "/", "/see", "/login", "/login/", "/logout", "/svelte/1", "/static/1", "/assets/1", "/favicon.ico", "/theme.css",
    "/robots.txt", "/manifest.json", "/gradio_api/startup-events", "/gradio_api/theme.css",
}  # fmt: skip


def png(size: int = 8) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def asked(client: httpx.Client, image: Any, model: str = "biformer_tiny") -> str:
    """What the API of the page See answers to a picture, without its library, which would upload it first."""
    data = [image, "", model, "", "auto", "", True, 0.5]
    sent = client.post("/gradio_api/call/see", json={"data": data})
    assert sent.status_code == 200, sent.text
    return client.get(f"/gradio_api/call/see/{sent.json()['event_id']}", timeout=60).text


@pytest.fixture
def client(serve: Any) -> Any:
    with httpx.Client(base_url=serve("see", max_megabytes=1), timeout=20) as client:
        yield client


def test_files_of_the_machine_are_not_served(client: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("kept to myself")
    monkeypatch.chdir(tmp_path)
    temp = Path(os.environ["GRADIO_TEMP_DIR"])
    temp.mkdir(exist_ok=True)
    (temp / "link.txt").symlink_to(secret)
    cached = tmp_path / ".gradio/cached_examples/x.txt"  # which Gradio serves
    cached.parent.mkdir(parents=True)
    cached.write_text("kept to myself")
    paths = [
        "/etc/passwd", "//etc/passwd", "/proc/self/environ", "file:///etc/passwd", "secret.txt", "./secret.txt",
        str(secret), f"{temp}/../secret.txt", f"{temp}/link.txt", f"{temp}", f"{temp}-other/x", server_module.__file__,
        str(cached), "a\0b", "\\\\host\\share", "C:\\x", "",
    ]  # fmt: skip
    for path in paths:
        for route in ("file=", "file/"):
            answer = client.get(f"/gradio_api/{route}{quote(path)}")
            assert answer.status_code in (403, 404), (route, path)
            assert "kept to myself" not in answer.text


def test_addresses_are_not_fetched(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    fetched = []

    async def lookup(host: str) -> str:
        fetched.append(host)
        raise AssertionError(host)

    monkeypatch.setattr("safehttpx.async_validate_url", lookup)
    monkeypatch.setattr("gradio.route_utils.safehttpx.async_validate_url", lookup)
    for address in ("http://127.0.0.1:9/x.png", "https://example.org/x.png", "HTTP://[::1]/x", "ftp://example.org/x"):
        assert client.get(f"/gradio_api/file={address}").status_code == 403
        assert client.get(f"/gradio_api/proxy={address}").status_code == 404
        for image in ({"path": address}, {"path": address, "meta": {"_type": "gradio.FileData"}, "url": address}):
            assert "taken as uploads only" in asked(client, image)
    assert fetched == []


def test_inputs_name_uploads_and_nothing_else(client: httpx.Client, tmp_path: Path):
    picture = tmp_path / "mine.png"
    picture.write_bytes(png())
    marked = {"meta": {"_type": "gradio.FileData"}}
    for path in (str(picture), "/etc/passwd", "data:image/png;base64,AAAA", "", "a\0b", "file:///etc/passwd"):
        assert "taken as uploads only" in asked(client, {"path": path})
        assert "taken as uploads only" in asked(client, {"path": path, **marked})
    uploaded = client.post("/gradio_api/upload", files={"files": ("mine.png", png())}).json()[0]
    assert client.get(f"/gradio_api/file={uploaded}").content == png()
    assert "no model is called" in asked(client, {"path": uploaded, **marked}, "no_such_model").lower()


def test_strange_inputs_are_answered_in_words(client: httpx.Client):
    for image in ("", 7, ["x"], {"path": 3}, {"url": "http://127.0.0.1:9/"}):
        answer = asked(client, image)
        assert "event: error" in answer and "Traceback" not in answer and "defect" not in answer
    few = client.post("/gradio_api/call/see", json={"data": []}).json()["event_id"]
    assert "not what this takes" in client.get(f"/gradio_api/call/see/{few}").text
    assert client.post("/gradio_api/call/see", content=b"{").status_code == 422
    assert client.post("/gradio_api/run/see", json={"data": []}).status_code == 404  # all wait in one line
    assert client.get("/config").status_code == 200


BODIES = [
    [], "x", 1, None, {}, {"data": None}, {"data": []}, {"data": [1], "fn_index": 9999, "session_hash": "s"},
    {"data": [], "fn_index": -1, "session_hash": "s"}, {"data": {}, "fn_index": "0", "session_hash": []},
    {"data": [None], "fn_index": 0, "session_hash": "s" * 10_000, "event_id": "x", "trigger_id": -4},
    {"session_hash": "s", "fn_index": 0, "event_id": "nobody's"}, {"no_such_parameter": 1},
    {"data": [], "component_id": 1, "fn_name": "__init__", "session_hash": "s"}, {"component_id": 99999, "fn_name": ""},
]  # fmt: skip


ROUTES = [
    "queue/join", "call/see", "call/v2/see", "call/nothing", "call/v2/nothing", "run/see", "run/predict", "reset",
    "component_server", "cancel", "upload",
]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_requests_that_make_no_sense_are_refused(served: str, route: str):
    with httpx.Client(base_url=served, timeout=20) as client:
        for body in BODIES:
            answer = client.post(f"/gradio_api/{route}", json=body)
            assert answer.status_code < 500 or "error" in answer.json(), (body, answer.text)
        assert client.get("/config").status_code == 200


@pytest.fixture(scope="module")
def served() -> Any:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        patch.setenv("GRADIO_TEMP_DIR", folder)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        blocks, address = server_module.launch(Serving(port=port), Settings(), "see")
        yield address
        blocks.close(verbose=False)


def test_uploads_have_a_limit(client: httpx.Client):
    def chunks() -> Any:
        for _ in range(60):
            yield b"x" * 100_000

    for size in (1_500_000, 5_000_000):
        answer = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * size)})
        assert answer.status_code == 413
    assert "at most 1 MB" in answer.text
    head = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/gradio_api/upload", content=chunks(), headers=head).status_code in (400, 413)
    for route in ("queue/join", "call/see", "component_server", "cancel"):
        answer = client.post(f"/gradio_api/{route}", content=chunks(), headers={"content-type": "application/json"})
        assert (route, answer.status_code) == (route, 413)
        answer = client.post(f"/gradio_api/{route}", content=b'"' + b"x" * 3_000_000 + b'"')
        assert (route, answer.status_code) == (route, 413)
    many = [("files", (f"{number}.png", b"x" * 900_000)) for number in range(9)]
    assert client.post("/gradio_api/upload", files=many).status_code == 413
    assert client.get("/config").status_code == 200


def test_what_nobody_needs_is_closed(client: httpx.Client):
    for path in ("process_recording", "vibe-edit", "dev/reload", "deep_link?session_hash=x", "runs", "stream/x/close"):
        for method in ("GET", "POST"):
            assert client.request(method, f"/gradio_api/{path}").status_code == 404
    assert client.get("/monitoring").status_code == 404


def routes(of: Any) -> Any:
    for route in of:
        inner = getattr(route, "original_router", None)
        yield from routes(inner.routes) if inner is not None else [route]


def test_who_has_not_logged_in_gets_the_form_and_nothing_else(serve: Any, monkeypatch: pytest.MonkeyPatch):
    apps = []
    create = App.create_app
    monkeypatch.setattr(App, "create_app", lambda *a, **k: apps.append(create(*a, **k)) or apps[-1])
    address = serve("see", serving=Serving(auth=AUTH, mcp=True), model="biformer_tiny")
    seen = 0
    with httpx.Client(base_url=address, timeout=5) as client:
        for route in routes(apps[0].routes):
            path = re.sub(r"\{[^}]*\}", "1", route.path)
            for method in getattr(route, "methods", None) or ("GET", "POST"):
                with client.stream(method, path) as answer:
                    seen += 1
                    assert answer.status_code == 401 or path in FOR_ALL, (method, path)
        for path in ("config/", "gradio_api/mcp/sse", "gradio_api/mcp/schema", "gradio_api/file=/etc/passwd", "x"):
            assert client.get(f"/{path}").status_code == 401
        form = client.get("/")
        assert '"auth_required":true' in form.text and "biformer" not in form.text and "/see" not in form.text
        assert client.head("/").status_code == 200
        for header in ("Basic", "Basic !", f"Basic {encoded('ann:wrong')}", f"Bearer {encoded(':'.join(AUTH))}"):
            assert client.get("/config", headers={"authorization": header}).status_code == 401
        assert client.get("/config", headers={"cookie": "access-token-unsecure-x=1; a"}).status_code == 401
        assert client.post("/login", data={"username": AUTH[0], "password": "wrong"}).status_code == 400
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": AUTH[0], "password": AUTH[1]}).status_code == 200
        assert client.get("/config").status_code == 200 and client.get("/gradio_api/info").status_code == 200
    assert seen > 60


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_programs_and_agents_log_in(serve: Any, monkeypatch: pytest.MonkeyPatch):
    from gradio_client import Client
    from gradio_client.exceptions import AuthenticationError

    address = serve("see", serving=Serving(auth=AUTH, mcp=True))
    with pytest.raises(AuthenticationError):
        Client(address, verbose=False)
    known = [endpoint.api_name for endpoint in Client(address, auth=AUTH, verbose=False).endpoints.values()]
    assert "/see" in known
    basic = {"authorization": f"Basic {encoded(':'.join(AUTH))}"}
    with httpx.Client(base_url=address, headers=basic, timeout=20) as client:
        assert "no picture yet" in asked(client, None)
    names, answers = asyncio.run(agent(f"{address}gradio_api/mcp/", basic))
    assert "see" in names
    for answer in answers:  # a file of this machine is neither read nor sent anywhere, and no address fetched
        assert answer.isError and "root:" not in str(answer.content)
    assert "taken as uploads only" in str(answers[0].content)


async def agent(address: str, headers: dict[str, str]) -> tuple[list[str], list[Any]]:
    mcp = pytest.importorskip("mcp", reason="pip install 'gradio[mcp]'")
    from mcp.client.streamable_http import streamable_http_client

    rest = {"sample": "", "model": "biformer_tiny", "other": "", "method": "auto", "target": "", "untrained": True}
    marked = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    client = httpx.AsyncClient(headers=headers, timeout=20)
    async with client, streamable_http_client(address, http_client=client) as (read, write, _):
        async with mcp.ClientSession(read, write) as session:
            await session.initialize()
            names = [tool.name for tool in (await session.list_tools()).tools]
            images = ("http://127.0.0.1:9/x.png", "/etc/passwd", marked)
            return names, [await session.call_tool("see", {"image": image, **rest, "opacity": 0.5}) for image in images]


def test_agents_are_not_there_unless_asked_for(client: httpx.Client):
    assert client.post("/gradio_api/mcp/", json={}).status_code == 404


def test_a_path_is_within_a_folder_or_not(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "file").touch()
    (tmp_path / "in_too").touch()
    (folder / "out").symlink_to(tmp_path / "in_too")
    assert within(str(folder / "file"), str(folder))
    for path in (folder, folder / "../in_too", folder / "out", tmp_path / "in_too", "file", "http://x", "x\0"):
        assert not within(str(path), str(folder))
    check_files([{"a": [{"path": str(folder / "file")}]}, None, 3, {"path": 4}], str(folder))
    with pytest.raises(UsageError, match="uploads only"):
        check_files([{"a": [{"path": str(folder / "out")}]}], str(folder))
