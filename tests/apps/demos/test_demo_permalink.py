"""Settings of a page in its address: what a link may say, and what it may not."""

from __future__ import annotations

import random
from typing import Any

import pytest

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

import gradio as gr

from apps.demos.permalink import _parsed, _plain, restore


def controls() -> dict[str, Any]:
    return {
        "switch": gr.Checkbox(),
        "part": gr.Slider(0, 1, value=0.5, step=0.1),
        "count": gr.Number(minimum=1, maximum=9),
        "kind": gr.Radio([("One", "one"), ("Two", "two")]),
        "level": gr.Dropdown([1, 2, 3]),
        "free": gr.Dropdown(["a"], allow_custom_value=True),
        "some": gr.CheckboxGroup(["a", "b", "c"]),
        "words": gr.Textbox(),
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("switch", "true", True), ("switch", "false", False), ("part", "0.3", 0.3), ("part", "1", 1), ("count", "9", 9),
        ("kind", "two", "two"), ("level", "3", 3), ("free", "anything", "anything"), ("some", '["a", "c"]', ["a", "c"]),
        ("some", "[]", []), ("words", "<b>?", "<b>?"),
    ],
)  # fmt: skip
def test_values_come_back_as_they_were(name: str, text: str, value: Any):
    got = _parsed(controls()[name], text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("switch", "yes"), ("part", "1.5"), ("part", "-1"), ("part", "nan"), ("part", "inf"), ("part", "x"),
        ("count", "0"), ("count", "1e400"), ("kind", "three"), ("kind", ""), ("level", "4"), ("some", "a"),
        ("some", '["z"]'), ("some", "[[]]"), ("some", "{}"), ("some", "[" * 900), ("words", "x" * 2001),
    ],
)  # fmt: skip
def test_what_a_control_does_not_offer_is_refused(name: str, text: str):
    with pytest.raises(ValueError):
        _parsed(controls()[name], text)


def test_any_text_is_a_value_or_refused():
    drawn = random.Random(0)
    for _ in range(300):
        text = "".join(chr(drawn.choice([drawn.randrange(32, 127), drawn.randrange(1, 0x2FFF)])) for _ in range(9))
        for control in controls().values():
            try:
                _parsed(control, text)
            except ValueError:
                pass


def test_what_a_warning_repeats_is_plain():
    assert _plain("<img src=x onerror=alert(1)>") == "&lt;img src=x onerror=alert(1)&gt;"
    assert len(_plain("x" * 999)) == 80


def test_a_control_without_a_place_in_an_address_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="File has no place"):
        _parsed(gr.File(), "x")
    with gr.Blocks() as blocks:
        restore(blocks, {"words": gr.Textbox()}, "run")
    assert len(blocks.fns) == 2
