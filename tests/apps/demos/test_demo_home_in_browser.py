"""The home of the demos in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from apps.demos.home import NAMES

pytestmark = pytest.mark.browser


def test_home_leads_to_every_page(serve: Any, visit: Any):
    page = visit(serve())
    for name in NAMES:
        page.locator(f'.cards a[href="{name}"]').wait_for()
    page.locator('.cards a[href="see"]').click()
    page.locator("#see-run").wait_for()
    assert page.errors == [] and page.outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_home_fits_a_telephone(serve: Any, visit: Any, dark: bool):
    page = visit(serve(), width=390, height=844, dark=dark)
    page.locator(".cards a").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    darkness = sum(int(part) for part in background.strip("rgba()").split(",")[:3])
    assert (darkness < 200) == dark
