"""The page Ask in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from apps.demos.uploads import samples

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
pytestmark = pytest.mark.browser


def answers(page: Any) -> Any:
    return page.locator("#ask-answers .answer")


def test_upload_ask_switch_and_ask_again(serve: Any, visit: Any):
    page = visit(serve("ask"))
    page.locator("#ask-run").wait_for()
    page.locator("#ask-image input[type=file]").set_input_files(samples("scenes")["scene 2"])
    expect(page.locator("#ask-image img")).to_be_visible()
    page.locator("#ask-question textarea").fill("what shape is the green object? answer in capitals")
    page.locator("#ask-question textarea").press("Enter")
    expect(answers(page)).to_have_text(["SQUARE"])
    expect(page.locator("#ask-answers img.read")).to_be_visible()
    page.locator("#ask-vmtc input[type=number]").fill("0.1")
    page.locator("#ask-vmtc input[type=number]").press("Tab")
    page.locator("#ask-run").click()
    expect(answers(page)).to_have_count(2)
    assert answers(page).nth(1).inner_text() != "SQUARE", "of 6 tokens it is not read"
    expect(page.locator("#ask-answers img.merged")).to_be_visible()
    expect(page.locator("#ask-answers")).to_contain_text("6 of 64 image tokens")
    expect(page.locator("#ask-costs")).to_contain_text("6 of 64")
    assert "vmtc=0.1" in page.url and "question=what+shape" in page.url
    assert page.errors == [] and page.outside == []


def test_ready_made_questions_bring_their_sample(serve: Any, visit: Any):
    page = visit(serve("ask"))
    ready = page.locator("#ask-ready input")
    ready.click()
    page.get_by_role("option", name="scene 4: what shape is the yellow object? answer in one word").click()
    expect(page.locator("#ask-image img")).to_be_visible()
    page.locator("#ask-mma input").check()
    page.locator("#ask-run").click()
    expect(answers(page)).to_have_text(["cross", "cross"])
    expect(page.locator("#ask-answers")).to_contain_text("scene_vlm/mma")
    with page.expect_download() as download:
        page.locator("#ask-csv").click()
    assert download.value.suggested_filename == "answers.csv"
    assert page.errors == [] and page.outside == []


def test_a_link_restores_the_page_on_a_telephone_in_the_dark(serve: Any, visit: Any):
    link = "?sample=scene+1&question=what+colour+is+the+diamond%3F+answer+in+one+word&mma=true&vmtc=0.5&cmai=true"
    page = visit(serve("ask") + link, width=390, height=844, dark=True)
    expect(answers(page)).to_have_text(["blue"] * 5)
    expect(page.locator("#ask-mma input")).to_be_checked()
    expect(page.locator("#ask-cmai input")).to_be_checked()
    expect(page.locator("#ask-vmtc input[type=number]")).to_have_value("0.5")
    assert page.locator("#ask-answers img").count() == 7
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []


def test_mistakes_are_said_and_words_are_no_markup(serve: Any, visit: Any, tmp_path: Path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    page = visit(serve("ask"))
    run, question = page.locator("#ask-run"), page.locator("#ask-question textarea")
    run.wait_for()
    run.click()
    expect(page.get_by_text("There is no picture yet").first).to_be_visible()
    page.locator("#ask-image input[type=file]").set_input_files(tmp_path / "huge.png")
    expect(page.locator("#ask-image img")).to_be_visible()
    run.click()
    expect(page.get_by_text("at most 50 megapixels are taken").first).to_be_visible()
    page.locator("#ask-samples button").nth(0).click()
    run.click()
    expect(page.get_by_text("There is no question yet").first).to_be_visible()
    question.fill("<img src=x onerror=document.title=1> {{value}} ${1+1} what colour is the diamond?")
    run.click()
    expect(page.locator("#ask-answers")).to_contain_text("does not know: <img, src=x, onerror=document")
    expect(page.locator("#ask-answers")).to_contain_text("{{value}}, ${1+1}")
    assert page.locator("img[src=x]").count() == 0 and page.title() != "1"
    assert page.errors == [] and page.outside == []
