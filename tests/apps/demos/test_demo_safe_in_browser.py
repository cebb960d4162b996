"""What a visitor's browser shows of refusals, and that nothing which visitors write runs in it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

from apps.demos.server import Serving

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=window.ran=1>"


def test_a_file_that_is_too_large_is_refused_in_words(serve: Any, visit: Any, tmp_path: Path):
    large = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large)
    page = visit(serve("see", max_megabytes=1))
    page.locator("#see-image input[type=file]").set_input_files(large)
    page.get_by_text("maximum allowed size").first.wait_for()
    assert page.outside == []


def test_who_has_to_log_in_does_so_and_is_in(serve: Any, visit: Any):
    page = visit(serve("see", serving=Serving(auth=("ann", "päss"))))
    fields = page.locator("input")
    fields.nth(0).fill("ann")
    fields.nth(1).fill("wrong")
    page.get_by_role("button", name="Login").click()
    page.get_by_text("Incorrect Credentials").wait_for()
    assert page.locator("#see-run").count() == 0
    fields.nth(0).fill("ann")
    fields.nth(1).fill("päss")
    page.get_by_role("button", name="Login").click()
    page.locator("#see-run").wait_for()
    assert page.errors == [] and page.outside == []


def test_what_a_link_or_a_file_says_does_not_run(serve: Any, visit: Any, tmp_path: Path):
    address = serve("see")
    linked = visit(f"{address}?model={quote(HOSTILE)}&method={quote(HOSTILE)}&sample=cat")
    linked.get_by_text("which this page does not offer").first.wait_for()
    linked.get_by_text("o model is called").first.wait_for()
    named = tmp_path / f"{HOSTILE}.png"
    Image.new("RGB", (8, 8)).save(named)
    given = visit(f"{address}?model=none&opacity={quote(HOSTILE)}")
    given.get_by_text("which this page does not offer").first.wait_for()
    given.locator("#see-image input[type=file]").first.set_input_files(named)
    given.locator("#see-image img").first.wait_for()
    given.locator("#see-run").click()
    given.get_by_text("o model is called").first.wait_for()
    for page in (linked, given):
        assert page.evaluate("window.ran") is None
        assert page.locator("img[src='x'], img[onerror]").count() == 0
        assert page.errors == [] and page.outside == []


def test_who_has_enough_waiting_is_told_so(serve: Any, visit: Any, slow: threading.Event):
    address = serve(serving=Serving(per_address=1))
    page = visit(address)
    page.locator("#run").wait_for()
    with httpx.Client(base_url=address, timeout=60) as client:
        held = client.post("/gradio_api/call/work", json={"data": [""]}).json()["event_id"]
        page.locator("#run").click()
        page.get_by_text("1 requests from your address are waiting").first.wait_for()
        slow.set()
        assert "done" in client.get(f"/gradio_api/call/work/{held}").text
    page.locator("#run").click()
    page.wait_for_function("[...document.querySelectorAll('textarea, input')].some(box => box.value === 'done')")
    assert page.errors == [] and page.outside == []


def test_a_full_line_is_a_polite_refusal(serve: Any, visit: Any, slow: threading.Event):
    address = serve(serving=Serving(queue=1, per_client=9, per_address=9), workers=1)
    page = visit(address)
    page.locator("#run").wait_for()
    with httpx.Client(base_url=address, timeout=60) as client:
        while client.post("/gradio_api/call/work", json={"data": [""]}).status_code == 200:
            pass
    page.locator("#run").click()
    page.get_by_text("try again").first.wait_for()
    assert page.errors == [] and page.outside == []


def test_a_defect_is_said_without_its_inside(serve: Any, visit: Any, slow: threading.Event):
    page = visit(serve())
    page.locator("#kind textarea, #kind input").first.fill("defect")
    page.locator("#run").click()
    page.get_by_text("defect of the demo").first.wait_for()
    assert page.get_by_text("inside").count() == 0
    assert page.errors == [] and page.outside == []
