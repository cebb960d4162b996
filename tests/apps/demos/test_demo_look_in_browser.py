"""The page Look in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from apps.demos.uploads import samples

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
pytestmark = pytest.mark.browser


def test_upload_search_click_another_target_and_search_again(serve: Any, visit: Any):
    page = visit(serve("look"))
    page.locator("#look-run").wait_for()
    page.locator("#look-image input[type=file]").set_input_files(samples("shelves")["shelf 3 by 9"])
    scene = page.locator("#look-scene img")
    expect(scene).to_be_visible()
    page.locator("#look-run").click()
    expect(page.locator("#look-density img")).to_be_visible()
    expect(page.locator("#look-step img")).to_be_visible()
    before = page.locator("#look-density img").get_attribute("src")
    target = page.locator("#look-target textarea, #look-target input")
    expect(target).to_have_value("2, 5")
    box = scene.bounding_box()
    scene.click(position={"x": box["width"] * 0.95, "y": box["height"] * 0.6})
    expect(target).to_have_value(re.compile("2, 9"))
    page.locator("#look-run").click()
    expect(page.locator("#look-density img")).not_to_have_attribute("src", before)
    assert "target=2%2C+9" in page.url
    assert page.errors == [] and page.outside == []


def test_people_beside_the_model_and_one_search_step_by_step(serve: Any, visit: Any, tmp_path: Path):
    lines = ["scanpath_id,image,target,t,x,y"]
    lines += [
        f"{name},shelf,x,{t},{x},{y}" for name in "ab" for t, (x, y) in enumerate([(108, 54), (60, 20), (110, 50)])
    ]
    (tmp_path / "people.csv").write_text("\n".join(lines))
    page = visit(serve("look"))
    page.locator("#look-samples button").nth(1).click()
    expect(page.locator("#look-scene img")).to_be_visible()
    expect(page.locator("#look-metrics")).to_be_hidden()
    page.get_by_text("Objects that lie freely").click()
    page.locator("#look-humans input[type=file]").set_input_files(tmp_path / "people.csv")
    expect(page.locator("#look-humans").get_by_text("people.csv")).to_be_visible()
    page.locator("#look-run").click()
    expect(page.locator("#look-metrics").get_by_text("ScanMatch").first).to_be_visible()
    step = page.locator("#look-step img")
    expect(step).to_be_visible()
    before = step.get_attribute("src")
    number = page.locator("#look-number input[type=number]")
    number.fill("2")
    number.press("Tab")
    expect(step).not_to_have_attribute("src", before)
    with page.expect_download() as film:
        page.locator("#look-film_file").click()
    assert film.value.suggested_filename == "scanpaths.gif"
    assert page.errors == [] and page.outside == []


def test_two_clicks_draw_a_box(serve: Any, visit: Any):
    page = visit(serve("look"))
    page.locator("#look-samples button").nth(1).click()
    scene = page.locator("#look-scene img")
    expect(scene).to_be_visible()
    page.get_by_label(re.compile("corner of a box")).check()
    box = scene.bounding_box()
    for share in (0.3, 0.6):
        with page.expect_response(re.compile("queue/data|run/predict")):  # one click must arrive before the other
            scene.click(position={"x": box["width"] * share, "y": box["height"] * share})
        page.wait_for_timeout(1000)
    page.get_by_text("Objects that lie freely").click()
    expect(page.locator("#look-boxes textarea")).to_have_value(re.compile(r"^\d+, \d+, \d+, \d+$"))
    assert page.errors == [] and page.outside == []


def test_a_link_restores_the_page_on_a_telephone_in_the_dark(serve: Any, visit: Any):
    query = "?sample=shelf%204%20by%207&rows=4&columns=7&target=1,1&num_scanpaths=5"
    page = visit(serve("look") + query, width=390, height=844, dark=True)
    expect(page.locator("#look-density img")).to_be_visible()
    expect(page.locator("#look-columns input")).to_have_value("7")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []


def test_mistakes_are_said_on_the_page(serve: Any, visit: Any):
    page = visit(serve("look"))
    page.locator("#look-run").wait_for()
    page.locator("#look-run").click()
    expect(page.get_by_text("There is no picture yet").first).to_be_visible()
    page.locator("#look-samples button").nth(1).click()
    expect(page.locator("#look-image img").first).to_be_visible()
    page.locator("#look-target textarea, #look-target input").fill("<img src=x onerror=alert(1)>")
    page.locator("#look-run").click()
    expect(page.get_by_text("onerror").first).to_be_visible()
    assert page.locator("img[src=x]").count() == 0
    assert page.errors == [] and page.outside == []
