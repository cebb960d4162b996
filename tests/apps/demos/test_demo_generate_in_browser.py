"""The page Generate in a real browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
pytestmark = pytest.mark.browser


def test_draw_click_a_word_and_draw_again(serve: Any, visit: Any):
    page = visit(serve("generate"))
    run = page.locator("#generate-run")
    run.wait_for()
    page.locator("#generate-steps input[type=number]").fill("4")
    run.click()
    status = page.locator("#generate-status textarea, #generate-status input")
    expect(status).to_have_value("Done.")
    expect(page.locator("#generate-pictures img")).to_have_count(2)
    expect(page.locator("#generate-maps img")).to_have_count(4)
    page.locator("#generate-words").get_by_label("red", exact=True).check()
    expect(page.locator("#generate-subjects textarea, #generate-subjects input")).to_have_value(re.compile("red"))
    page.locator("#generate-methods").get_by_label("Attend-and-Excite").check()
    run.click()
    expect(page.locator("#generate-pictures img")).to_have_count(3)
    expect(page.locator("#generate-maps img")).to_have_count(9)
    assert "Attend-and-Excite" in page.url
    assert page.errors == [] and page.outside == []


def test_stop_stops(serve: Any, visit: Any):
    page = visit(serve("generate"))
    page.locator("#generate-run").wait_for()
    page.locator("#generate-steps input[type=number]").fill("100")
    page.locator("#generate-run").click()
    status = page.locator("#generate-status textarea, #generate-status input")
    expect(status).to_have_value(re.compile("step [0-9]+ of 100"))
    page.locator("#generate-stop").click()
    expect(status).to_have_value("Stopped.")
    page.locator("#generate-steps input[type=number]").fill("2")
    page.locator("#generate-run").click()
    expect(status).to_have_value("Done.")
    assert page.errors == [] and page.outside == []


def test_a_link_restores_the_page_on_a_telephone_in_the_dark(serve: Any, visit: Any):
    query = "?prompt=a%20green%20triangle%20and%20a%20red%20circle&subjects=triangle,%20circle&steps=3&seed=5"
    page = visit(serve("generate") + query, width=390, height=844, dark=True)
    expect(page.locator("#generate-status textarea, #generate-status input")).to_have_value("Done.")
    expect(page.locator("#generate-words").get_by_label("triangle")).to_be_checked()
    expect(page.locator("#generate-seed input")).to_have_value("5")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []


def test_mistakes_are_said_on_the_page(serve: Any, visit: Any):
    page = visit(serve("generate"))
    run = page.locator("#generate-run")
    run.wait_for()
    page.locator("#generate-subjects textarea, #generate-subjects input").fill("circle, <img src=x onerror=alert(1)>")
    run.click()
    expect(page.get_by_text("onerror").first).to_be_visible()
    assert page.locator("img[src=x]").count() == 0
    page.locator("#generate-prompt textarea").fill("")
    run.click()
    expect(page.get_by_text(re.compile("prompt is empty")).first).to_be_visible()
    assert page.errors == [] and page.outside == []
