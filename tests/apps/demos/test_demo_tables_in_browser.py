"""The pages Models and Results in a real browser."""

from __future__ import annotations

import re
from typing import Any

import pytest

from apps.demos import models, results

# FastAPI silences this one while a server starts, by filters that all threads share: a page that is still at work in
# another thread may put them back too early.
_STARTING = "ignore:The 'alias' attribute with value:UserWarning"
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings(_STARTING)]


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def test_models_are_searched_chosen_and_handed_out(serve: Any, visit: Any):
    page = visit(serve("models"))
    status = page.locator("#models-status")
    expect(status).to_contain_text(f"{len(models.found('', ''))} models")
    plot = page.locator("#models-plot svg:visible")
    before = plot.inner_html()
    page.locator("#models-pattern textarea, #models-pattern input").first.fill("litv2")
    page.locator("#models-run").click()
    expect(status).to_contain_text(f"{len(models.found('litv2', ''))} models")
    expect(plot).not_to_contain_text("biformer_tiny")
    assert plot.inner_html() != before
    assert "pattern=litv2" in page.url and "family" not in page.url
    page.locator("#models-table").get_by_text("litv2_medium", exact=True).first.click()
    expect(page.locator("#models-python")).to_contain_text('timm.create_model("litv2_medium", pretrained=True)')
    expect(page.locator("#models-shell")).to_contain_text("attnsuite classify photos/ --model litv2_medium")
    expect(page.locator("#models-facts")).to_contain_text("Published: 83.3 % top-1, 7.5 GMACs")
    with page.expect_download() as file:
        page.locator("#models-csv").click()
    with open(file.value.path(), encoding="utf-8") as text:
        assert text.readline().startswith("name,family,params,gmacs,top1")
        assert len(text.readlines()) == len(models.found("litv2", ""))
    assert page.errors == [] and page.outside == []


def test_models_that_are_not_there_are_said_in_words(serve: Any, visit: Any):
    page = visit(serve("models"))
    expect(page.locator("#models-status")).to_contain_text("models")
    page.locator("#models-pattern textarea, #models-pattern input").first.fill("<img src=x onerror=alert(1)>")
    page.keyboard.press("Enter")
    expect(page.locator("#models-status")).to_contain_text("No model of the suite is called like '<img src=x")
    page.locator("#models-pattern textarea, #models-pattern input").first.fill("![seen](http://example.com/seen.png)")
    page.locator("#models-run").click()
    expect(page.locator("#models-status")).to_contain_text("like '![seen](http://example.com/seen.png)'")
    assert page.locator("#models-plot svg:visible").count() == 0
    assert page.errors == [] and page.outside == []


def test_a_link_opens_the_models_that_it_names(serve: Any, visit: Any):
    page = visit(serve() + "models?family=tap&pattern=fan", width=390, height=844, dark=True)
    expect(page.locator("#models-status")).to_contain_text(f"{len(models.found('fan', 'tap'))} models")
    expect(page.locator("#models-pattern textarea, #models-pattern input").first).to_have_value("fan")
    expect(page.locator("#models-family input")).to_have_value("tap")
    expect(page.locator("#models-plot svg.narrow")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.errors == [] and page.outside == []


def test_models_begin_with_the_one_that_the_server_was_started_with(serve: Any, visit: Any):
    page = visit(serve("models", model="biformer_tiny"))
    expect(page.locator("#models-status")).to_have_text("1 model, 1 with a published accuracy")
    expect(page.locator("#models-python")).to_contain_text('timm.create_model("biformer_tiny", pretrained=True)')
    assert page.errors == [] and page.outside == []


def test_results_are_filtered_and_handed_out(serve: Any, visit: Any):
    page = visit(serve("results"))
    items = page.locator("#results-plot li")
    expect(items).to_have_count(len(results.found("", "")))
    page.locator("#results-verdict input").click()
    page.get_by_role("option", name="contradicted", exact=True).click()
    against = results.found("", "contradicted")
    expect(items).to_have_count(len(against))
    expect(page.locator("#results-status")).to_contain_text(f"{len(against)} contradicted")
    assert page.locator("#results-plot .verdict").all_inner_texts() == ["contradicted"] * len(against)
    assert "verdict=contradicted" in page.url
    with page.expect_download() as file:
        page.locator("#results-svg").click()
    with open(file.value.path(), encoding="utf-8") as text:
        assert text.read().startswith("<svg xmlns=")
    page.locator("#results-search textarea, #results-search input").first.fill("no such <b>words</b>")
    page.locator("#results-run").click()
    expect(page.locator("#results-status")).to_contain_text("No claim fits “contradicted” and “no such <b>words</b>”")
    expect(items).to_have_count(0)
    assert page.errors == [] and page.outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_link_opens_the_claims_that_it_names(serve: Any, visit: Any, dark: bool):
    page = visit(serve() + "results?method=OAT&verdict=shown", width=390, height=844, dark=dark)
    expect(page.locator("#results-plot li")).to_have_count(len(results.found("OAT", "shown")))
    expect(page.locator("#results-method input")).to_have_value("OAT")
    expect(page.locator("#results-plot code")).to_have_text(re.compile("benchmarks.claims.oat"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    whole = page.locator("#results-plot .track svg").first.bounding_box()
    assert whole["x"] >= 0 and whole["x"] + whole["width"] <= 390
    assert page.errors == [] and page.outside == []
