"""Takes the screenshots of the demos: docs/images/demo_<page>.jpg.

    python docs/screens.py             # all, a minute
    python docs/screens.py see look    # some

Needs Chromium (its path in CHROMIUM, else /usr/bin/chromium) and `pip install -e ".[browser,demo]"`.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.demos.host import Settings  # noqa: E402
from apps.demos.server import Serving, launch  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1280, 960

# What is opened, and what is there once the page is done.
PAGES = {
    "see": ("?sample=cat", "#see-spot img"),
    "generate": ("?prompt=a%20red%20circle%20and%20a%20blue%20square&steps=15&seed=1", "#generate-maps img"),
    "ask": (
        "?sample=scene%201&question=what%20colour%20has%20the%20same%20shape%20as%20the%20red%20cross%3F%20answer%20in"
        "%20one%20word&mma=true&vmtc=0.25",
        "#ask-answers img",
    ),
    "look": ("?sample=shelf%203%20by%209&target=2,5", "#look-step img"),
}


def take(browser: Browser, address: str, name: str) -> None:
    """One page, from the top, after its permalink has run."""
    query, ready = PAGES[name]
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(f"{address}{name}{query}", wait_until="domcontentloaded")
    page.locator(ready).first.wait_for(timeout=120_000)
    page.wait_for_timeout(1500)  # pictures fade in
    with Image.open(io.BytesIO(page.screenshot())) as screen:
        screen.convert("RGB").save(IMAGES / f"demo_{name}.jpg", quality=82, optimize=True)
    page.close()


def main() -> None:
    blocks, address = launch(Serving(), Settings())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--headless", "--no-sandbox"]
        )
        for name in sys.argv[1:] or PAGES:
            take(browser, address, name)
        browser.close()
    blocks.close(verbose=False)


if __name__ == "__main__":
    main()
