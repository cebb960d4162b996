"""Models: the list of `attnsuite models`, drawn, and how to load each."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import gradio as gr

import weights

from ..catalog import ModelFacts, catalog
from ..errors import UsageError
from .charts import Point, inline, scatter, standalone, text
from .downloads import as_csv, handed_out
from .host import Host, said
from .permalink import restore, write

__all__ = ["ABOUT", "FAMILIES", "TITLE", "drawings", "facts_about", "found", "how_to_load", "page", "points"]

TITLE = "Models"
ABOUT = "Every model of the suite: how large, how accurate as published, and the line that loads it."

# Known before timm is: the page is drawn without it. A test holds this against the list itself.
FAMILIES = (
    "biformer",
    "dcal",
    "efficientnet_lite",
    "ela",
    "fan",
    "hrnet_ocr",
    "litv2",
    "psa",
    "rvt",
    "sparsifiner",
    "tap",
)
_SHAPES = {"biformer": "circle", "litv2": "square", "tap": "triangle"}
# Text of a drawing that shrinks with the page cannot be read on a telephone: there is one for each.
_CSS = """
.room { height: 400px; }
.narrow { display: none; }
@media (max-width: 640px) { .narrow { display: block; } .wide { display: none; } }
"""
_HEADERS = ["Name", "Family", "Params, M (counted)", "GMACs (counted)", "Top-1, % (published)", "Weights"]
_NOTE = (
    "Accuracies are the authors', on ImageNet-1K; none was measured here. Filled marks: multiply-adds counted on our "
    "networks. Rings: as the authors published them; a ring around its mark says that both agree."
)


def found(pattern: str, family: str) -> list[ModelFacts]:
    """The models that a visitor asks for.

    Args:
        pattern: Part of a name, or a shell pattern; nothing for all.
        family: One of `FAMILIES`; nothing for all.

    Raises:
        UsageError: Nothing matches, or there is no such family.
    """
    if family and family not in FAMILIES:
        raise UsageError(f"there is no family {family!r}: expected one of {', '.join(FAMILIES)}, or nothing for all")
    wanted = pattern.strip()
    try:
        facts = [one for one in catalog(wanted.lower() or None, everything=False) if family in ("", one.family)]
    except UsageError:
        facts = []
    if not facts:
        raise UsageError(f"no model of {family or 'the suite'} is called like {wanted!r}")
    return facts


def points(facts: Sequence[ModelFacts]) -> list[Point]:
    """The models that have a published accuracy, with multiply-adds as counted and as published."""
    published = {entry.architecture: entry.gmacs for entry in weights.entries() if entry.default}
    return [
        Point(one.name, one.family, one.gmacs, published.get(one.name), one.top1)
        for one in facts
        if one.top1 is not None and one.gmacs is not None
    ]


def drawings(models: Sequence[Point]) -> tuple[str, str]:
    """The scatter plot, for the page and as a file of its own.

    Args:
        models: What is drawn; may be none.
    """
    if not models:
        words = "None of these has a published ImageNet accuracy to draw."
        return f"<p>{words}</p>", standalone(text(words, 12, 24), 400, 40)
    label = f"Published accuracy against multiply-accumulates of {len(models)} models; the table below has both"
    page = "".join(
        inline(scatter(models, _SHAPES, width, height), width, height, label, kind)
        for kind, width, height in (("wide", 720, 460), ("narrow", 340, 400))
    )
    return page, standalone(scatter(models, _SHAPES), 720, 460)


def how_to_load(model: ModelFacts) -> tuple[str, str]:
    """A line of Python that gives the network, and a command that runs or trains it.

    Args:
        model: A line of the list.
    """
    name, segments = model.name, model.name.endswith(("_seg", "_ocr"))
    verb = f"attnsuite segment photos/ --model {name}" if segments else f"attnsuite classify photos/ --model {name}"
    shell = f"{verb} -o masks" if segments else f"{verb} -o labels.csv"
    if model.source is None:
        trained = f"{verb} --checkpoint FILE -o masks" if segments else f"attnsuite train photos/ --model {name} -o run"
        return f'import attnsuite, timm; model = timm.create_model("{name}", num_classes=10)', trained
    if name in weights.shipped_classifiers():
        folder = f"attnsuite.weights.shipped('{name}')"
        return f'import attnsuite, timm; model = timm.create_model(f"local-dir:{{{folder}}}", pretrained=True)', shell
    if model.source.startswith("package "):
        python = (
            f'import timm, weights; model = timm.create_model("{name}"); '
            f'model.load_state_dict(weights.state_dict_for("{name}", model))'
        )
        return python, shell
    return f'import attnsuite, timm; model = timm.create_model("{name}", pretrained=True)', shell


def facts_about(model: ModelFacts) -> str:
    """What is published of a model and what was counted here, as Markdown.

    Args:
        model: A line of the list.
    """
    entry = next((one for one in weights.entries() if one.default and one.architecture == model.name), None)
    told = [f"{entry.top1:g} % top-1"] if entry and entry.top1 else []
    told += [f"{entry.gmacs:g} GMACs"] if entry and entry.gmacs else []
    lines = [
        f"Counted here: {model.params:g} M parameters" + (f", {model.gmacs:g} GMACs" if model.gmacs else ""),
        f"Published: {', '.join(told) or 'no figure that we hold'}",
        f"Weights: {_weights_of(model)}{f', under {entry.license}' if entry else ''}",
    ]
    if entry:
        lines.append(f"Paper: [{entry.paper}]({entry.paper_url})")
        lines += [note for note in (entry.notes, entry.terms) if note]
    return "".join(f"- {line}\n" for line in lines)


def _weights_of(model: ModelFacts) -> str:
    if model.source is None:
        return "none published"
    if model.here:
        return "here"
    return f"at {model.source.removeprefix('https://').partition('/')[0]}"


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            hint = "part of a name, or biformer_*"
            pattern = gr.Textbox(
                host.settings.model or "", label="Search", placeholder=hint, max_length=80, elem_id="models-pattern"
            )
            family = gr.Dropdown(
                [("All families", ""), *FAMILIES], value="", label="Family", elem_id="models-family", filterable=False
            )
            run = gr.Button("Search", variant="primary", elem_id="models-run")
            status = gr.HTML(_told("Reading the list…"), elem_id="models-status")
            examples = gr.Examples([["litv2", ""], ["*_tiny*", ""], ["", "tap"]], [pattern, family], label="Examples")
            with gr.Row():
                rows_file = gr.DownloadButton("Rows (CSV)", elem_id="models-csv", size="sm", min_width=100)
                plot_file = gr.DownloadButton("Plot (SVG)", elem_id="models-svg", size="sm", min_width=100)
        with gr.Column(scale=3, min_width=320):
            plot = gr.HTML('<div class="room"></div>', elem_id="models-plot", css_template=_CSS)
            gr.Markdown(_NOTE)
    table, name = _table_and_lines()
    outputs = [status, table, plot, name, rows_file, plot_file]
    settings = {"pattern": pattern, "family": family}
    listed: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "models-list", "show_progress_on": plot}
    for trigger in (run.click, pattern.submit, family.input, examples.load_input_event.then):
        write(trigger(_show, [pattern, family], outputs, **listed), settings)
    restore(blocks, settings)

    def opened(request: gr.Request, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        """The list as the address asks for it; `restore` sets the controls to the same."""
        given = request.query_params
        return _show(given.get("pattern", host.settings.model or "")[:80], given.get("family", ""), progress)

    blocks.load(opened, None, outputs, **listed)
    gr.api(_models, api_name="models", concurrency_id="models-list")


def _table_and_lines() -> tuple[gr.Dataframe, gr.Dropdown]:
    """Draws the table, and below it the model that is chosen in it, or from a list by keyboard, and how to load it."""
    table = gr.Dataframe(
        headers=_HEADERS,
        datatype=["str", "str", "number", "number", "number", "str"],
        label="Models: choose a row to see how it is loaded",
        show_label=True,
        interactive=False,
        max_height=420,
        elem_id="models-table",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            name = gr.Dropdown([], label="Model", elem_id="models-name")
            facts = gr.Markdown(elem_id="models-facts")
        with gr.Column(scale=2, min_width=320):
            # one colour: those of Gradio's highlighting are too pale on white
            options: dict[str, Any] = {"language": None, "lines": 1, "wrap_lines": True, "interactive": False}
            python = gr.Code("…", label="Load it in Python", elem_id="models-python", **options)
            shell = gr.Code("…", label="Run it from a shell", elem_id="models-shell", **options)
    quiet: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    table.select(_picked, None, name, **quiet)
    name.change(_explain, name, [facts, python, shell], **quiet)
    return table, name


def _show(pattern: str, family: str, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008 - Gradio's way
    progress(0, desc="Reading the list of models")
    with said():
        try:
            facts = found(pattern, family)
        except UsageError as error:
            return _told(str(error)), [], "", gr.Dropdown([], value=None), None, None
        drawn = points(facts)
        plot, file = drawings(drawn)
        rows = [[one.name, one.family, one.params, one.gmacs, one.top1, _weights_of(one)] for one in facts]
        names = [one.name for one in facts]
        return (
            _told(f"{len(facts)} model{'s' * (len(facts) > 1)}, {len(drawn)} with a published accuracy"),
            rows,
            plot,
            gr.Dropdown(names, value=names[0]),
            handed_out("attnsuite_models.csv", as_csv([one.as_dict() for one in facts])),
            handed_out("attnsuite_models.svg", file),
        )


def _told(text: str) -> str:
    return f'<p role="status">{html.escape(text[:1].upper() + text[1:])}</p>'


def _picked(event: gr.SelectData) -> Any:
    return event.row_value[0] if event.row_value else gr.skip()


def _explain(name: str | None) -> tuple[str, str, str]:
    with said():
        model = next((one for one in catalog(name, everything=False) if one.name == name), None) if name else None
        if model is None:
            return "", "", ""
        return facts_about(model), *how_to_load(model)


def _models(pattern: str = "", family: str = "") -> list[dict[str, Any]]:
    """Lists the models of the suite, as `attnsuite models --json` does.

    Args:
        pattern: Part of a name, or a shell pattern such as biformer_*; nothing for all.
        family: The method: biformer, litv2, tap and so on; nothing for all.

    Returns:
        One object a model: name, family, params (millions), gmacs (billions), top1 (per cent, as published), source
        of its weights, and whether they are here.
    """
    with said():
        return [one.as_dict() for one in found(pattern, family)]
