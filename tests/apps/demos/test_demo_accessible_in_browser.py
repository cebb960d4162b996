"""Every page of the demos by keyboard, by what a screen reader is told, in the dark and on a telephone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from apps.demos.home import NAMES

# FastAPI silences this one while a server starts, by filters that all threads share: a page that is still at work in
# another thread may put them back too early.
_STARTING = "ignore:The 'alias' attribute with value:UserWarning"
pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings(_STARTING)]

CONTROLS = {"button", "checkbox", "combobox", "link", "radio", "searchbox", "slider", "spinbutton", "switch", "tab"}
CONTROLS |= {"textbox", "treeitem", "menuitem", "listbox"}

# Contrast of each visible text with what lies behind it, by the colours that the browser computed.
_CONTRAST = """() => {
  const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
  const draw = canvas.getContext('2d', { willReadFrequently: true });
  const over = layers => {
    draw.clearRect(0, 0, 1, 1);
    for (const layer of layers) { draw.fillStyle = layer; draw.fillRect(0, 0, 1, 1) }
    return [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
  };
  const light = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const words = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!words || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (['SCRIPT', 'STYLE', 'NOSCRIPT', 'TITLE'].includes(element.tagName.toUpperCase())) continue;
    if (element.closest('[disabled], [aria-disabled=true]')) continue;
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const layers = [], style = getComputedStyle(element);
    let image = false;
    for (let one = element; one; one = one.parentElement) {
      layers.unshift(getComputedStyle(one).backgroundColor);
      image ||= getComputedStyle(one).backgroundImage !== 'none' && one !== document.body;
    }
    if (image) continue;
    const ink = element instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(over([...layers, ink])), light(over(layers))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), bold = parseInt(style.fontWeight) >= 700;
    const wanted = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    if (contrast < wanted) found.push(`${contrast.toFixed(2)}: ${words.slice(0, 60)} <${element.tagName}>`);
  }
  return [...new Set(found)];
}"""


def nameless(page: Any) -> list[str]:
    """Controls of which a screen reader would say no more than what kind they are, as Chromium tells it."""
    session = page.context.new_cdp_session(page)
    found = []
    for node in session.send("Accessibility.getFullAXTree")["nodes"]:
        role, name = node.get("role", {}).get("value"), node.get("name", {}).get("value", "").strip()
        if role in CONTROLS and not node.get("ignored") and not name:
            outer = session.send("DOM.resolveNode", {"backendNodeId": node["backendDOMNodeId"]})["object"]["objectId"]
            call = {"objectId": outer, "functionDeclaration": "function() { return this.outerHTML.slice(0, 300) }"}
            call["returnByValue"] = True
            found.append(f"{role}: {session.send('Runtime.callFunctionOn', call)['result']['value']}")
    return found


def settled(page: Any, name: str) -> None:
    """Waits until the page stands, the lists of models and results with it."""
    page.locator(f"#{name}-run").wait_for()
    if name in ("models", "results"):
        page.locator(f"#{name}-plot svg:visible").first.wait_for()
    if name == "models":
        page.locator("#models-python").get_by_text("create_model").wait_for()


@pytest.mark.parametrize("name", NAMES)
def test_page_fits_a_telephone_and_names_its_controls(serve: Any, visit: Any, name: str):
    page = visit(serve() + name, width=390, height=844)
    settled(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert nameless(page) == []
    assert page.evaluate(_CONTRAST) == []
    assert page.errors == [] and page.outside == []


@pytest.mark.parametrize("name", NAMES)
def test_page_in_the_dark_can_be_read_and_worked_by_keyboard(serve: Any, visit: Any, name: str):
    page = visit(serve() + name, dark=True)
    settled(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    assert page.evaluate(_CONTRAST) == []
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == f"{name}-run":
            break
    assert page.evaluate("document.activeElement.id") == f"{name}-run"
    outline = page.evaluate(
        "(({ outlineStyle, boxShadow }) => [outlineStyle, boxShadow])(getComputedStyle(document.activeElement))"
    )
    assert outline != ["none", "none"], "the focus cannot be seen"
    assert page.errors == [] and page.outside == []
    # that it is pressed is what counts: no model need run for it
    page.route("**/gradio_api/**", lambda route: route.abort() if route.request.method == "POST" else route.continue_())
    with page.expect_request(lambda request: request.method == "POST" and "/gradio_api/" in request.url):
        page.keyboard.press("Enter")


def test_the_checks_find_what_is_wrong(serve: Any, visit: Any):
    page = visit(serve("results"))
    settled(page, "results")
    page.evaluate(
        """() => document.body.insertAdjacentHTML('afterbegin', `<button><svg width="9" height="9"></svg></button>
        <input type="text" placeholder="" /><p style="color: #aaa; background: #fff">too pale</p>
        <p style="color: #555; background: #fff">dark enough</p>`)"""
    )
    assert [found.split(":")[0] for found in nameless(page)] == ["button", "textbox"]
    assert page.evaluate(_CONTRAST) == ["2.32: too pale <P>"]


def test_pages_are_drawn_before_torch_is_imported():
    code = (
        "import sys; from apps.demos.home import build; from apps.demos.host import Host; build(Host())\n"
        "print([name for name in ('torch', 'timm', 'transformers', 'diffusers', 'cv2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
