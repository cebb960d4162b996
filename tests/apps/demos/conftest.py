"""Real servers on loopback for the demos, and a real browser: system Chromium driven by Playwright, no downloads."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import SAMPLES

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 90_000


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serves a page, or all, and gives its address: `serve("see", serving=Serving(…), max_models=1)`."""
    from apps.demos.host import Settings
    from apps.demos.server import Serving, launch

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    running = []

    def start(name: str | None = None, serving: Serving | None = None, **settings: Any) -> str:
        serving = serving or Serving()
        # Gradio leaves a socket open for each port that it finds taken, which pytest counts as an error
        serving = replace(serving, port=serving.port or free_port())
        blocks, address = launch(serving, Settings(**{"device": "cpu", **settings}), name)
        running.append(blocks)
        return address

    yield start
    for blocks in running:
        blocks.close(verbose=False)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A page whose one event ends when it is told to, or at once if it is asked to fail."""
    import gradio as gr

    from apps.demos.host import said

    go_on = threading.Event()

    def page(host: Any, name: str | None) -> Any:
        def work(kind: str) -> str:
            with said():
                if kind == "memory":
                    raise MemoryError
                if kind == "cuda":
                    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
                if kind == "defect":
                    raise ZeroDivisionError("<b>inside</b>")
            assert go_on.wait(60)
            return "done"

        with gr.Blocks() as blocks:
            kind, out = gr.Textbox(label="Kind", elem_id="kind"), gr.Textbox(label="Out")
            gr.Button("Run", elem_id="run").click(work, kind, out, api_name="work", **host.heavy)
        return blocks

    monkeypatch.setattr("apps.demos.server.build", page)
    yield go_on
    go_on.set()


@pytest.fixture
def connect(serve: Callable[..., str]) -> Iterator[Callable[..., Any]]:
    """Serves a page and gives a client of its API: `connect("see", max_models=1)`."""
    from gradio_client import Client

    clients: list[Client] = []

    def start(name: str, **settings: Any) -> Client:
        clients.append(Client(serve(name, **settings), verbose=False))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def broken(tmp_path: Path) -> list[tuple[Path, str]]:
    """Files that visitors may try, and what every page that takes pictures says of them."""
    words, large, moving, cut = (tmp_path / name for name in ("words.png", "large.png", "moving.gif", "cut.jpg"))
    words.write_text("no picture")
    Image.new("1", (10_000, 6_000)).save(large)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    cut.write_bytes((SAMPLES / "cat.jpg").read_bytes()[:5000])
    return [
        (words, "no picture that can be read"),
        (large, "10000 × 6000 pixels: at most 50 megapixels"),
        (moving, "is an animation"),
        (cut, "is damaged"),
    ]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not shutil.which(CHROMIUM):
        pytest.skip(f"no Chromium at {CHROMIUM}: apt-get install chromium, or set CHROMIUM")
    sync_api.expect.set_options(timeout=TIMEOUT_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Opens an address; refuses every request that leaves it, keeps the errors of the page, takes a picture at the end.

    `page.errors` and `page.outside` are lists that a test compares with `[]`. Pictures go to the folder SCREENSHOTS.
    """
    pages: list[Any] = []

    def go(url: str, width: int = 1440, height: int = 900, dark: bool = False) -> Any:
        scheme = "dark" if dark else "light"
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.errors, page.outside = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        origin = "/".join(url.split("/")[:3])

        def guard(route: Any) -> None:
            if route.request.url.startswith((origin, "data:", "blob:")):
                route.continue_()
            else:
                page.outside.append(route.request.url)
                route.abort()

        page.route("**/*", guard)
        page.goto(url, wait_until="domcontentloaded")
        pages.append(page)
        return page

    yield go
    folder = os.environ.get("SCREENSHOTS")
    for number, page in enumerate(pages):
        if folder:
            os.makedirs(folder, exist_ok=True)
            # a page of many screens takes longer to draw at once than it took to test
            whole = page.evaluate("document.documentElement.scrollHeight") < 6000
            page.screenshot(
                path=os.path.join(folder, f"{request.path.stem}_{request.node.name}_{number}.png"), full_page=whole
            )
        page.context.close()
