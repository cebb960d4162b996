"""The page Generate in a real browser."""

from __future__ import annotations

import re
import threading
import zipfile
from typing import Any

import pytest
from support import wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
pytestmark = pytest.mark.browser

TEXT = "textarea, input"


def part(page: Any, name: str, inside: str = "") -> Any:
    """What is in a part of the page: the matches of each selector in it, or the part itself."""
    return page.locator(", ".join(f"#generate-{name} {one.strip()}" for one in inside.split(",")))


def opened(visit: Any, address: str, steps: int, **options: Any) -> Any:
    page = visit(address, **options)
    part(page, "run").wait_for()
    part(page, "steps", "input[type=number]").fill(str(steps))
    return page


def drawing() -> bool:
    return any(thread.name == "drawing" for thread in threading.enumerate())


def test_draw_look_at_a_step_click_a_word_and_draw_again(serve: Any, visit: Any):
    page = opened(visit, serve("generate"), 4)
    part(page, "run").click()
    status = part(page, "status", TEXT)
    expect(status).to_have_value("Done.")
    expect(part(page, "pictures", "img")).to_have_count(2)
    maps = part(page, "maps", "img")
    expect(maps).to_have_count(4)
    expect(part(page, "losses", "figure")).to_have_count(3)
    last = maps.first.get_attribute("src")
    part(page, "step", "input[type=range]").focus()
    page.keyboard.press("Home")
    expect(maps.first).not_to_have_attribute("src", last)
    with page.expect_download() as file:
        part(page, "zip").click()
    with zipfile.ZipFile(file.value.path()) as archive:
        assert {"plain.png", "a_star_maps.npz"} < {*archive.namelist()}
    part(page, "words").get_by_label("red", exact=True).check()
    expect(part(page, "subjects").get_by_text("red", exact=True)).to_be_visible()
    part(page, "methods").get_by_label("Attend-and-Excite").check()
    part(page, "run").click()
    expect(part(page, "pictures", "img")).to_have_count(3)
    expect(maps).to_have_count(9)
    assert "Attend-and-Excite" in page.url and "red" in page.url
    assert page.errors == [] and page.outside == []


def test_subjects_follow_the_prompt(serve: Any, visit: Any):
    page = opened(visit, serve("generate"), 2)
    page.get_by_role("button", name="a green triangle and a yellow diamond").click()
    words = part(page, "words")
    expect(words.get_by_label("triangle")).to_be_checked()
    expect(words.get_by_label("green")).not_to_be_checked()
    expect(part(page, "seed", "input")).to_have_value("12")
    part(page, "prompt", TEXT).fill("a red circle and a fire truck")
    expect(words.get_by_label("circle")).to_be_checked()
    expect(words.get_by_label("triangle")).to_have_count(0)
    page.get_by_text("Regions: paint").click()
    part(page, "subjects", "input").fill("fire truck")
    page.keyboard.press("Enter")
    expect(part(page, "legend")).to_contain_text(re.compile("orange: circle.*blue: fire truck"))
    part(page, "run").click()
    expect(part(page, "status", TEXT)).to_have_value(re.compile("Done. The model does not know fire, truck"))
    expect(part(page, "maps", "figcaption").nth(1)).to_have_text("plain: fire truck")
    assert page.errors == [] and page.outside == []


def test_stop_stops_and_so_does_leaving(serve: Any, visit: Any):
    address = serve("generate")
    page = opened(visit, address, 100)
    part(page, "run").click()
    status = part(page, "status", TEXT)
    expect(status).to_have_value(re.compile("Step [0-9]+ of 100"))
    part(page, "stop").click()
    expect(status).to_have_value("Stopped.")
    wait_for(lambda: not drawing())
    part(page, "steps", "input[type=number]").fill("2")
    part(page, "run").click()
    expect(status).to_have_value("Done.")
    assert page.errors == [] and page.outside == []
    part(page, "steps", "input[type=number]").fill("100")
    part(page, "run").click()
    expect(status).to_have_value(re.compile("Step [0-9]+ of 100, plain"))
    page.goto("about:blank")
    wait_for(lambda: not drawing())


def test_a_region_is_painted(serve: Any, visit: Any):
    page = opened(visit, serve("generate"), 2)
    page.get_by_text("Regions: paint").click()
    sheet = part(page, "regions", "canvas").first
    sheet.wait_for()
    sheet.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # the accordion slides open
    box = sheet.bounding_box()
    across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(across - 40, down - 40)
    page.mouse.down()
    page.mouse.move(across + 40, down + 40, steps=8)
    page.mouse.up()
    for name in ("A-STAR", "plain"):
        part(page, "methods").get_by_label(name).click()
    part(page, "methods").get_by_label("Attend-and-Excite").check()
    part(page, "run").click()
    status = part(page, "status", TEXT)
    expect(status).to_have_value("Done. Regions guide A-STAR only, which was not drawn.")
    for name in ("circle", "square"):
        part(page, "words").get_by_label(name).uncheck()
    expect(part(page, "legend")).to_contain_text("Choose subjects first")
    part(page, "run").click()
    expect(page.get_by_text("A region is painted in orange, the colour of subject 1").first).to_be_visible()
    assert page.errors == [] and page.outside == []


def test_a_link_restores_the_page_on_a_telephone_in_the_dark(serve: Any, visit: Any):
    query = '?prompt=a%20green%20triangle%20and%20a%20red%20circle&subjects=["triangle","circle"]&steps=3&seed=5'
    page = visit(serve("generate") + query, width=390, height=844, dark=True)
    expect(part(page, "status", TEXT)).to_have_value("Done.")
    expect(part(page, "words").get_by_label("triangle")).to_be_checked()
    expect(part(page, "seed", "input")).to_have_value("5")
    expect(part(page, "maps", "figcaption").first).to_have_text("plain: triangle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []


def test_mistakes_are_said_on_the_page(serve: Any, visit: Any):
    page = opened(visit, serve("generate"), 2)
    page.get_by_text("Regions: paint").click()
    part(page, "subjects", "input").fill("<img src=x onerror=alert(1)>")
    page.keyboard.press("Enter")
    expect(part(page, "legend")).to_contain_text("green: <img src=x")
    part(page, "run").click()
    expect(page.get_by_text("is not in the prompt").first).to_be_visible()
    assert page.locator("img[src=x]").count() == 0
    part(page, "prompt", TEXT).fill("")
    part(page, "run").click()
    expect(page.get_by_text("The prompt is empty").first).to_be_visible()
    assert page.errors == [] and page.outside == []
