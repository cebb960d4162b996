"""Drawings of the pages Models and Results, as SVG: text and axes in the colour of the text around them.

Colours are of Okabe and Ito's set, those that stand out from white and from black; each comes with a shape of its own.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Axis", "Point", "inline", "mark", "scatter", "standalone", "text"]

BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
# What a shape means is for the caller to say; a colour never stands without its shape.
COLOURS = {"circle": BLUE, "square": VERMILLION, "triangle": GREEN, "diamond": "currentColor"}

_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 84, 46


@dataclass(frozen=True)
class Axis:
    """From values to pixels.

    Attributes:
        low: Value at the start.
        high: Value at the end.
        start: Pixel of the start.
        end: Pixel of the end.
        log: Whether ratios are kept, not differences.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values that lie between its ends."""
        if self.log:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [digit * 10.0**ten for ten in tens for digit in (1, 2, 5)]
        else:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next((m for m in (0.5, 1, 2, 5) if (self.high - self.low) / (m * step) <= 6), 10)
            values = [step * i for i in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [value for value in values if self.low <= value <= self.high]


@dataclass(frozen=True)
class Point:
    """A model in the plot.

    Attributes:
        name: Of the model.
        group: Its family.
        x: Multiply-accumulates as counted here, in billions.
        published_x: The same as published, where it was.
        y: Accuracy, as published.
    """

    name: str
    group: str
    x: float
    published_x: float | None
    y: float


def mark(shape: str, x: float, y: float, size: float = 5, hollow: bool = False, title: str = "") -> str:
    """A shape at a place, in its colour.

    Args:
        shape: A key of `COLOURS`.
        x: Centre.
        y: Centre.
        size: Half its width.
        hollow: Only its outline.
        title: Shown when it is pointed at.
    """
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    }
    colour = COLOURS[shape]
    paint = f'fill="none" stroke="{colour}" stroke-width="1.7"' if hollow else f'fill="{colour}"'
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {paint}>{inner}</circle>'
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners[shape])
    return f'<polygon points="{points}" {paint}>{inner}</polygon>'


def inline(body: str, width: float, height: float, label: str, kind: str = "") -> str:
    """A drawing as part of a page, at most as wide as its place.

    Args:
        body: What is drawn.
        width: In pixels.
        height: In pixels.
        label: What it shows, for those who do not see it.
        kind: CSS class.
    """
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" class="{kind}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" style="max-width:100%;height:auto" font-size="13">{body}</svg>'
    )


def standalone(body: str, width: float, height: float) -> str:
    """A drawing as a file of its own: dark on white, whatever the page looks like.

    Args:
        body: What is drawn.
        width: In pixels.
        height: In pixels.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" color="#1f2937" font-family="system-ui, sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>\n'
    )


def scatter(points: Sequence[Point], shapes: Mapping[str, str], width: int = 720, height: int = 460) -> str:
    """Accuracy against multiply-accumulates: filled where counted here, a ring where published.

    Args:
        points: At least one.
        shapes: A key of `COLOURS` for each family that has one of its own; others share the diamond.
        width: In pixels.
        height: In pixels.

    Returns:
        What `inline` or `standalone` makes a drawing of.
    """
    xs = [x for point in points for x in (point.x, point.published_x) if x]
    ys = [point.y for point in points]
    across = Axis(min(xs) / 1.25, max(xs) * 1.5, _LEFT, width - _RIGHT, log=True)
    up = Axis(min(ys) - 0.4, max(ys) + 0.4, height - _BOTTOM, _TOP)
    own = {group: shapes.get(group, "diamond") for group in sorted({point.group for point in points})}
    body = _frame(across, up) + _legend(own)
    taken = [(x - 10, y - 10, x + 10, y + 10) for x, y in ((across.at(one.x), up.at(one.y)) for one in points)]
    for point in points:
        x, y, shape = across.at(point.x), up.at(point.y), own[point.group]
        told = f"{point.name}: {point.y:g} % as published; {point.x:g} GMACs counted here"
        if point.published_x:
            told += f", {point.published_x:g} published"
            body += mark(shape, across.at(point.published_x), y, 8, hollow=True, title=told)
        body += mark(shape, x, y, 4.5, title=told) + _label(point.name, x, y, taken, (across, up))
    return body


def _frame(across: Axis, up: Axis) -> str:
    """Axes, a faint grid, and what they mean."""
    parts = []
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{up.end}" y2="{up.start}" stroke="currentColor" opacity=".15"/>')
        parts.append(text(f"{tick:g}", x, up.start + 18, "middle"))
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(
            f'<line x1="{across.start}" x2="{across.end}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".15"/>'
        )
        parts.append(text(f"{tick:g}", across.start - 7, y + 4, "end"))
    middle = (across.start + across.end) / 2
    parts.append(text("multiply-accumulates of one picture, billions", middle, up.start + 38, "middle"))
    parts.append(text("ImageNet-1K top-1, %, as published", 4, up.end - 10))
    return "".join(parts)


def _legend(shapes: Mapping[str, str]) -> str:
    """Which shape is which family, and what filled and hollow mean."""
    parts, x = [], 12.0
    for group, shape in shapes.items():
        parts.append(mark(shape, x, 12, 5.5) + text(group, x + 12, 16))
        x += 36 + 7.2 * len(group)
    parts.append(mark("diamond", 12, 36, 4.5) + text("GMACs counted here", 24, 40))
    parts.append(mark("diamond", 184, 36, 7, hollow=True) + text("GMACs as published", 199, 40))
    return "".join(parts)


def _label(
    name: str, x: float, y: float, taken: list[tuple[float, float, float, float]], within: tuple[Axis, Axis]
) -> str:
    """A name beside its mark, where it covers nothing; `taken` learns of it. None where there is no room."""
    across, up = within
    width = 7.3 * len(name)
    for left, base in ((x + 12, y + 4), (x - 12 - width, y + 4), (x - width / 2, y - 13), (x - width / 2, y + 22)):
        box = (left, base - 11, left + width, base + 3)
        inside = across.start < left and box[2] < across.end and up.end < box[1] and box[3] < up.start
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return text(name, left, base)
    return ""


def text(words: str, x: float, y: float, anchor: str = "start") -> str:
    """Words at a place, in the colour of the text around the drawing.

    Args:
        words: Not escaped yet.
        x: Where they start, or as `anchor` says.
        y: Their base line.
        anchor: `"start"`, `"middle"` or `"end"`.
    """
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{html.escape(words)}</text>'
