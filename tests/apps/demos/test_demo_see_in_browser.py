"""The page See in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import SAMPLES

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
pytestmark = pytest.mark.browser


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    return tmp_path / "huge.png"


def result(page: Any) -> Any:
    return page.locator("#see-first")


def test_upload_look_switch_and_look_again(serve: Any, visit: Any):
    page = visit(serve("see"))
    page.locator("#see-run").wait_for()
    page.locator("#see-image input[type=file]").set_input_files(SAMPLES / "coffee.jpg")
    expect(page.locator("#see-image img")).to_be_visible()
    page.locator("#see-run").click()
    expect(result(page)).to_contain_text("espresso")
    expect(page.locator("#see-slider img").first).to_be_visible()
    assert page.locator("#see-second").count() == 0, "no box for a model that was not asked"
    before = page.locator("#see-slider img").last.get_attribute("src")
    page.locator("#see-opacity input[type=number]").fill("0.2")
    page.locator("#see-opacity input[type=range]").dispatch_event("pointerup")
    model = page.locator("#see-model input")
    model.fill("shapes_biformer")
    model.press("Enter")
    page.locator("#see-run").click()
    expect(result(page)).to_contain_text(re.compile("red|green|blue|yellow"))
    assert page.locator("#see-slider img").last.get_attribute("src") != before
    assert "model=shapes_biformer" in page.url
    assert page.errors == [] and page.outside == []


def test_a_click_shows_where_the_place_attends(serve: Any, visit: Any):
    page = visit(serve("see") + "?sample=cat&model=shapes_biformer")
    spot = page.locator("#see-spot img")
    expect(spot).to_be_visible()
    before = spot.get_attribute("src")
    box = spot.bounding_box()
    spot.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.6})
    expect(page.locator("#see-stages img").first).to_be_visible()
    expect(page.locator("#see-x input[type=number]")).to_have_value(re.compile("3[5-9]|4[0-5]"))
    assert spot.get_attribute("src") != before
    assert page.errors == [] and page.outside == []


def test_a_link_restores_the_page_on_a_telephone_in_the_dark(serve: Any, visit: Any):
    page = visit(serve("see") + "?sample=cat&other=shapes_biformer&opacity=0.3", width=390, height=844, dark=True)
    expect(result(page)).to_contain_text("cat")
    expect(page.locator("#see-second")).to_contain_text(re.compile("red|green|blue|yellow"))
    expect(page.locator("#see-opacity input[type=number]")).to_have_value("0.3")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []


def test_mistakes_are_said_on_the_page(serve: Any, visit: Any, huge: Path):
    page = visit(serve("see"))
    run = page.locator("#see-run")
    run.wait_for()
    run.click()
    expect(page.get_by_text("There is no picture yet").first).to_be_visible()
    page.locator("#see-image input[type=file]").set_input_files(huge)
    expect(page.locator("#see-image img")).to_be_visible()
    run.click()
    expect(page.get_by_text("at most 50 megapixels are taken").first).to_be_visible()
    model = page.locator("#see-model input")
    model.fill("<img src=x onerror=alert(1)>")
    model.press("Enter")
    page.locator("#see-samples button").nth(2).click()
    run.click()
    expect(page.get_by_text("no model is called").first).to_be_visible()
    assert page.locator("img[src=x]").count() == 0
    assert page.errors == [] and page.outside == []
