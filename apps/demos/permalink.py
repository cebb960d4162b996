"""Settings of a page in its address, so that a link shows a colleague the same thing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import gradio as gr

__all__ = ["restore", "write"]


def restore(page: gr.Blocks, settings: Mapping[str, gr.components.Component], run: str | None = None) -> None:
    """Sets controls by the address when the page is opened, then presses a button.

    Args:
        page: The blocks that hold the page.
        settings: A control for each name in the address. A value that a control does not offer is left out, with a
            warning on the page.
        run: `elem_id` of the button that is pressed if the address says anything.
    """

    def read(request: gr.Request) -> list[Any]:
        given = dict(request.query_params)
        values = []
        for name, control in settings.items():
            if name not in given:
                values.append(gr.skip())
                continue
            try:
                values.append(_parsed(control, given[name]))
            except ValueError:
                gr.Warning(f"The link says {name}={_plain(given[name])}, which this page does not offer.")
                values.append(gr.skip())
        return values if len(values) > 1 else values[0]

    # through the queue, as warnings come by no other way
    opened = page.load(read, None, list(settings.values()), api_visibility="private", show_progress="hidden")
    if run is not None:
        # the address may hold what others put there, such as the choice of a theme
        names = json.dumps([*settings])
        opened.then(
            None,
            None,
            None,
            js=f"() => {{ const given = new URLSearchParams(location.search);"
            f" if ({names}.some(name => given.has(name))) document.getElementById({json.dumps(run)}).click() }}",
        )


def write(event: Any, settings: Mapping[str, gr.components.Component]) -> None:
    """After an event, puts the values of the controls into the address, without a new page in the browser's history.

    Args:
        event: What `button.click(…)` returned.
        settings: As for `restore`.
    """
    names = json.dumps([*settings])
    event.success(
        None,
        list(settings.values()),
        None,
        js=f"(...values) => {{ const link = new URL(location.href);"
        f" {names}.forEach((name, i) => {{ const value = values[i];"
        " if (value === null || value === undefined || value === '' || value.length === 0)"
        " link.searchParams.delete(name);"
        " else link.searchParams.set(name, Array.isArray(value) ? JSON.stringify(value) : String(value)) });"
        " history.replaceState(history.state, '', link) }",
    )


def _parsed(control: gr.components.Component, text: str) -> Any:
    """What a control takes, from the text in an address.

    Raises:
        ValueError: It does not take that.
    """
    if len(text) > 2000:
        raise ValueError(text)
    if isinstance(control, gr.Checkbox):
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if isinstance(control, gr.Slider | gr.Number):
        number = float(text)
        low, high = control.minimum, control.maximum
        if not (low is None or low <= number) or not (high is None or number <= high):
            raise ValueError(text)
        return int(number) if number.is_integer() else number
    if isinstance(control, gr.Dropdown | gr.Radio | gr.CheckboxGroup):
        return _choice(control, text)
    if isinstance(control, gr.Textbox):
        return text
    raise TypeError(f"a {type(control).__name__} has no place in an address")


def _choice(control: Any, text: str) -> Any:
    offered = [value for _, value in control.choices]
    several = isinstance(control, gr.CheckboxGroup) or getattr(control, "multiselect", False)
    chosen = json.loads(text) if several else [text]
    if not isinstance(chosen, list) or not all(isinstance(value, str) for value in chosen):
        raise ValueError(text)
    if not getattr(control, "allow_custom_value", False) and not set(chosen) <= {str(value) for value in offered}:
        raise ValueError(text)
    values = [next((value for value in offered if str(value) == one), one) for one in chosen]
    return values if several else values[0]


def _plain(text: str) -> str:
    import html

    return html.escape(text[:80])
