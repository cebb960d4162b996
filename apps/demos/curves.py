"""Losses of several methods over the steps of a generation, as drawings that lie side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from .charts import COLOURS, Axis, inline, mark, text

__all__ = ["curves"]

# A method is told by colour, shape and dashes.
_LOOKS = {"plain": ("circle", "6 4"), "A-STAR": ("square", ""), "Attend-and-Excite": ("triangle", "2 3")}
_TITLES = {
    "segregation": ("Segregation", "how much subjects overlap; A-STAR lowers it"),
    "retention": ("Retention", "what subjects lose from step to step; A-STAR lowers it"),
    "attend_and_excite": ("Attend-and-Excite", "what the weakest subject lacks; that method lowers it"),
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 330, 210, 44, 12, 14, 34

Losses = Mapping[str, Sequence[float]]


def curves(losses: Mapping[str, Losses]) -> str:
    """Draws each loss of all methods over the steps.

    Args:
        losses: Of each method, by the name of the loss its value at each step; not a number where there is none.

    Returns:
        HTML; nothing where there is no loss.
    """
    names = [*dict.fromkeys(name for of_method in losses.values() for name in of_method)]
    if not names:
        return ""
    methods = [method for method in losses if losses[method]]
    item = '<li style="display:flex;gap:.4rem;align-items:center">'
    legend = "".join(f"{item}{inline(_key(method), 46, 16, method)} {html.escape(method)}</li>" for method in methods)
    panels = "".join(
        f'<figure style="margin:0"><figcaption><strong>{_TITLES[name][0]}</strong>: {_TITLES[name][1]}</figcaption>'
        f"{_panel(name, {method: losses[method][name] for method in methods})}</figure>"
        for name in names
    )
    flow = "list-style:none;padding:0;margin:0 0 .4rem;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;align-items:center"
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.8rem"
    return f'<ul style="{flow}">{legend}</ul><div style="{grid}">{panels}</div>'


def _key(method: str) -> str:
    shape, dashes = _LOOKS[method]
    return (
        f'<line x1="2" x2="44" y1="8" y2="8" stroke="{COLOURS[shape]}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        + mark(shape, 23, 8, 4.5)
    )


def _panel(name: str, values: Losses) -> str:
    if name == "retention":  # there is nothing to be kept at the first step, unless it is a region
        values = {method: [own[0] or math.nan, *own[1:]] for method, own in values.items()}
    steps = max(len(own) for own in values.values())
    finite = [value for own in values.values() for value in own if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.5
    across = Axis(1 if steps > 1 else 0.5, max(steps, 1.5), _LEFT, _WIDTH - _RIGHT)
    up = Axis(low - margin, high + margin, _HEIGHT - _BOTTOM, _TOP)
    body = _frame(across, up)
    for number, (method, own) in enumerate(values.items()):
        body += _curve(method, own, across, up, number / len(values))
    ends = "; ".join(f"{method} ends at {own[-1]:.3g}" for method, own in values.items())
    return inline(body, _WIDTH, _HEIGHT, f"{_TITLES[name][0]} loss over {steps} steps: {ends}")


def _frame(across: Axis, up: Axis) -> str:
    parts = [
        f'<line x1="{across.start}" x2="{across.end}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>'
        f"{text(f'{tick:.3g}', across.start - 6, y + 4, 'end')}"
        for tick in up.ticks()
        for y in [up.at(tick)]
    ]
    whole = [tick for tick in across.ticks() if float(tick).is_integer() and tick >= 1]
    parts += [text(f"{tick:g}", across.at(tick), up.start + 16, "middle") for tick in whole]
    parts.append(text("step", (across.start + across.end) / 2, up.start + 31, "middle"))
    return "".join(parts)


def _curve(method: str, values: Sequence[float], across: Axis, up: Axis, shift: float) -> str:
    """A line that is broken where there is no value, with a few marks along it, beside those of other methods."""
    shape, dashes = _LOOKS[method]
    points = [(across.at(step), up.at(v)) if math.isfinite(v) else None for step, v in enumerate(values, 1)]
    parts, run = [], []
    for point in [*points, None]:
        if point is not None:
            run.append(f"{point[0]},{point[1]}")
            continue
        if len(run) > 1:
            parts.append(
                f'<polyline points="{" ".join(run)}" fill="none" stroke="{COLOURS[shape]}" stroke-width="2" '
                f'stroke-dasharray="{dashes}"/>'
            )
        run = []
    every = max(1, len(points) // 5)
    for step in range(round(shift * every), len(points), every):
        if (at := points[step]) is not None:
            parts.append(mark(shape, *at, 4, title=f"{method}, step {step + 1}: {values[step]:.3g}"))
    return "".join(parts)
