"""Results: what papers claim, what was measured here in small, and what that says."""

from __future__ import annotations

import functools
import html
import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import gradio as gr

from ..errors import UsageError
from .charts import Axis, inline, mark, standalone, text
from .downloads import as_csv, handed_out
from .host import Host, said
from .permalink import restore, write

__all__ = ["ABOUT", "SHAPES", "TITLE", "as_file", "as_page", "claims", "found", "methods", "page"]

TITLE = "Results"
ABOUT = "What the papers claim, measured again in small: what showed, what did not, and what was contradicted."

# A verdict is told by its words and by its shape; colour comes third.
SHAPES = {"shown": "circle", "not shown at this scale": "diamond", "contradicted": "square"}
_UNITS = {
    "percentage points": "percentage points",
    "nats a token": "nats a token",
    "times as fast": "times as fast, above 1 or above what is claimed",
    "share saved": "share of the cost that is saved; counted, so without an interval",
    "units of the measure": "in units of the measure itself",
}
_NOTE = (
    "Marks are the difference in the direction of the claim, lines its 95 % interval: right of zero speaks for the "
    "claim, left of it against. A verdict also asks for a small p, adjusted for all claims of the paper, and some "
    "claims allow for a loss that they name."
)
_TRACK = 300  # pixels from the lowest to the highest value
_CSS = """
section { margin: 0 0 2rem; }
h2 { margin: 0 0 .2rem; font-size: 1.2rem; }
p { margin: 0 0 .4rem; font-size: .9rem; }
code { user-select: all; overflow-wrap: anywhere; }
.unit { margin-top: .8rem; font-style: italic; }
ul { list-style: none; margin: 0; padding: 0; }
li { display: grid; grid-template-columns: minmax(0, 1fr) 310px; gap: 0 1rem; margin: 0;
     border-top: 1px solid var(--border-color-primary); }
li > div { padding: .45rem 0; }
/* zero, as one line through all claims over an axis */
li > .track { padding: .2rem 0; display: flex; align-items: center;
     background: linear-gradient(var(--body-text-color-subdued), var(--body-text-color-subdued)) no-repeat
                 var(--zero) 0 / 1px 100%; }
.track svg, .axis svg { display: block; overflow: visible; }
.said b { font-weight: 600; }
.verdict { display: inline-flex; gap: .4rem; align-items: center; font-size: .9rem; }
.figures { font-size: .85rem; }
.axis { display: grid; grid-template-columns: minmax(0, 1fr) 310px; gap: 0 1rem; }
.axis svg { grid-column: 2; }
@media (max-width: 900px) {
  li, .axis { grid-template-columns: minmax(0, 1fr); }
  .axis svg { grid-column: 1; }
}
"""


@functools.cache
def claims() -> list[dict[str, Any]]:
    """All claims, each with the method, paper and command of its report; as `docs/tables.py` wrote them."""
    reports = json.loads(resources.files("apps.demos").joinpath("claims.json").read_text(encoding="utf-8"))
    keys = ("method", "paper", "command", "cpu", "date")
    return [{key: report[key] for key in keys} | claim for report in reports for claim in report["claims"]]


def methods() -> list[str]:
    """The methods that claims are about, in the order of docs/results.md."""
    return list(dict.fromkeys(claim["method"] for claim in claims()))


def found(method: str, verdict: str, search: str = "") -> list[dict[str, Any]]:
    """The claims that a visitor asks for.

    Args:
        method: One of `methods`; nothing for all.
        verdict: A key of `SHAPES`; nothing for all.
        search: Words that all occur in the claim, its figures or its paper.

    Raises:
        UsageError: Nothing matches, or there is no such method or verdict.
    """
    for what, given, known in (("method", method, methods()), ("verdict", verdict, [*SHAPES])):
        if given and given not in known:
            raise UsageError(f"there is no {what} {given!r}: expected one of {', '.join(known)}, or nothing for all")
    words = search.lower().split()
    texts = ("method", "paper", "after", "claim", "published", "ours")
    matching = [
        claim
        for claim in claims()
        if method in ("", claim["method"])
        and verdict in ("", claim["verdict"])
        and all(word in " ".join(str(claim[key]) for key in texts).lower() for word in words)
    ]
    if not matching:
        asked = [method, f"“{verdict}”" if verdict else "", f"“{' '.join(words)}”" if words else ""]
        raise UsageError(f"no claim fits {' and '.join(one for one in asked if one)}")
    return matching


def _panels(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Claims by method, then by unit: what can be drawn over one axis."""
    panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        panels.setdefault(row["method"], {}).setdefault(row["unit"], []).append(row)
    return panels


def _axis(rows: Sequence[Mapping[str, Any]], start: float) -> Axis:
    """From the lowest to the highest end of an interval, with zero inside."""
    ends = [0.0, *(end for row in rows for end in row["interval"] or [row["difference"]])]
    pad = 0.04 * (max(ends) - min(ends)) or 1.0
    return Axis(min(ends) - pad, max(ends) + pad, start, start + _TRACK)


def _interval(row: Mapping[str, Any], axis: Axis, y: float) -> str:
    """The interval and the difference of a claim."""
    drawn = ""
    if row["interval"]:
        low, high = (axis.at(end) for end in row["interval"])
        drawn += f'<path d="M{low} {y - 4:g}v8m0-4H{high}m0-4v8" fill="none" stroke="currentColor" stroke-width="1.6"/>'
    return drawn + mark(SHAPES[row["verdict"]], axis.at(row["difference"]), y, 5.5)


def _ticks(axis: Axis, y: float) -> str:
    return "".join(text(f"{tick:g}", axis.at(tick), y, "middle") for tick in axis.ticks())


def as_page(rows: Sequence[dict[str, Any]]) -> str:
    """The claims as HTML: words and intervals beside each other, by method.

    Args:
        rows: What `found` gave.
    """
    parts = []
    for method, units in _panels(rows).items():
        first = next(iter(units.values()))[0]
        parts.append(
            f"<section><h2>{html.escape(method)}</h2><p>{html.escape(first['paper'])}. Measured on "
            f"{html.escape(first['cpu'])}, {first['date']}. Measure again, in a checkout: "
            f"<code>{html.escape(first['command'])}</code></p>"
        )
        for unit, panel in units.items():
            axis = _axis(panel, 5)
            parts.append(f'<p class="unit">Difference, {_UNITS[unit]}</p><ul>')
            parts += [_item(row, axis) for row in panel]
            label = f"Axis from {axis.low:.3g} to {axis.high:.3g}"
            parts.append(f'</ul><div class="axis">{inline(_ticks(axis, 14), _TRACK + 10, 20, label)}</div>')
        parts.append("</section>")
    return "".join(parts)


def _item(row: Mapping[str, Any], axis: Axis) -> str:
    after = f"{html.escape(row['after'])}; " if row["after"] else ""
    glyph = f'<svg width="14" height="14" aria-hidden="true">{mark(SHAPES[row["verdict"]], 7, 7)}</svg>'
    label = f"Difference {row['difference']:g}"
    if row["interval"]:
        label += " (interval {:g} to {:g})".format(*row["interval"])
    return (
        f'<li><div><div class="said">{after}<b>{html.escape(row["claim"])}</b></div><span class="verdict">{glyph}'
        f'{html.escape(row["verdict"])}</span><div class="figures">Ours: {html.escape(row["ours"])}<br>'
        f"Published: {html.escape(row['published'])}</div></div>"
        f'<div class="track" style="--zero:{axis.at(0):g}px">'
        f"{inline(_interval(row, axis, 12), _TRACK + 10, 24, label)}</div></li>"
    )


def as_file(rows: Sequence[dict[str, Any]]) -> str:
    """The claims with their intervals as an SVG file of its own.

    Args:
        rows: What `found` gave.
    """
    parts, y, track = [_legend(12)], 48.0, 590
    for method, units in _panels(rows).items():
        for unit, panel in units.items():
            axis = _axis(panel, track)
            parts.append(f'<g font-weight="700">{text(f"{method}: {_UNITS[unit]}", 12, y)}</g>')
            y, top = y + 22, y + 8
            for row in panel:
                lines = textwrap.wrap(f"{row['after']}; {row['claim']}" if row["after"] else row["claim"], 80)
                parts += [text(line, 12, y + 17 * i) for i, line in enumerate(lines)]
                parts.append(_interval(row, axis, y - 4 + 8.5 * (len(lines) - 1)))
                y += 17 * len(lines) + 6
            zero = axis.at(0)
            parts.append(
                f'<path d="M{zero} {top:g}V{y - 12:g}" stroke="currentColor" opacity=".5"/>{_ticks(axis, y + 2)}'
            )
            y += 40
    return standalone("".join(parts), track + _TRACK + 20, y)


def _legend(y: float) -> str:
    drawn, x = "", 18.0
    for verdict, shape in SHAPES.items():
        drawn += mark(shape, x, y, 5.5) + text(verdict, x + 12, y + 4)
        x += 40 + 7 * len(verdict)
    return drawn


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            method = gr.Dropdown(
                [("All methods", ""), *methods()], value="", label="Method", elem_id="results-method", filterable=False
            )
            verdict = gr.Dropdown(
                [("All verdicts", ""), *SHAPES], value="", label="Verdict", elem_id="results-verdict", filterable=False
            )
            search = gr.Textbox(
                label="Search", placeholder="such as: attention", max_length=80, elem_id="results-search"
            )
            run = gr.Button("Show", variant="primary", elem_id="results-run")
            status = gr.HTML(elem_id="results-status")
            examples = gr.Examples(
                [["", "contradicted", ""], ["HiLo attention", "", ""], ["", "shown", "faster"]],
                [method, verdict, search],
                label="Examples",
            )
            with gr.Row():
                rows_file = gr.DownloadButton("Rows (CSV)", elem_id="results-csv", size="sm", min_width=100)
                plot_file = gr.DownloadButton("Plot (SVG)", elem_id="results-svg", size="sm", min_width=100)
            gr.Markdown(_NOTE)
        with gr.Column(scale=3, min_width=320):
            plot = gr.HTML(elem_id="results-plot", css_template=_CSS)
    settings = {"method": method, "verdict": verdict, "search": search}
    outputs = [status, plot, rows_file, plot_file]
    quiet: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    for trigger in (run.click, search.submit, method.input, verdict.input, examples.load_input_event.then):
        write(trigger(_show, [*settings.values()], outputs, **quiet), settings)
    restore(blocks, settings)
    blocks.load(_opened, None, outputs, **quiet)
    gr.api(_results, api_name="results", queue=False)


def _show(method: str, verdict: str, search: str) -> tuple[Any, ...]:
    with said():
        try:
            rows = found(method, verdict, search)
        except UsageError as error:
            told = html.escape(str(error))
            return f'<p role="status">{told[:1].upper()}{told[1:]}</p>', "", None, None
        return (
            _counted(rows),
            as_page(rows),
            handed_out("attnsuite_results.csv", as_csv(rows)),
            handed_out("attnsuite_results.svg", as_file(rows)),
        )


def _opened(request: gr.Request) -> tuple[Any, ...]:
    """The claims that the address asks for; `restore` sets the controls to the same."""
    given = request.query_params
    return _show(given.get("method", ""), given.get("verdict", ""), given.get("search", "")[:80])


def _counted(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many claims there are of each verdict, which is the legend at once."""
    counts = Counter(row["verdict"] for row in rows)
    lines = "".join(
        f'<li style="display:flex;gap:.5rem;align-items:center"><svg width="14" height="14" aria-hidden="true">'
        f"{mark(shape, 7, 7)}</svg>{counts[verdict]} {verdict}</li>"
        for verdict, shape in SHAPES.items()
    )
    claims_are = "1 claim" if len(rows) == 1 else f"{len(rows)} claims"
    return f'<div role="status">{claims_are}<ul style="list-style:none;margin:0;padding:0">{lines}</ul></div>'


def _results(method: str = "", verdict: str = "", search: str = "") -> list[dict[str, Any]]:
    """Lists what papers claim and what was measured of it, as docs/results.md does.

    Args:
        method: Its name, such as BiFormer's "Bi-level routing attention"; nothing for all.
        verdict: "shown", "not shown at this scale" or "contradicted"; nothing for all.
        search: Words that all occur in the claim, its figures or its paper.

    Returns:
        One object a claim: method, paper, command that measures it again, cpu, date, claim, published, ours, verdict,
        n (inputs), after (the claim that it goes on from), unit, difference in the direction of the claim, and its
        95 % interval or null.
    """
    with said():
        return found(method, verdict, search)
