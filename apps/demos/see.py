"""See: what vision models attend to in a picture, one model or two side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, cast

import gradio as gr
import numpy as np

import weights

from ..models import DEFAULT_MODEL
from .downloads import as_csv, as_png, handed_out
from .host import Host, said
from .permalink import restore, write
from .uploads import chosen, picture

__all__ = ["ABOUT", "TITLE", "page"]

TITLE = "See"
ABOUT = "What a vision model attends to in your picture, and what another one makes of it."

_KIND = "photographs"
_METHODS = [
    ("what suits the model", "auto"),
    ("attention, weighted by the class", "attention"),
    ("class activation (Grad-CAM)", "activation"),
    ("attention rolled out (ViT)", "rollout"),
]
_OF_TIMM = (
    "resnet18.a1_in1k",
    "convnext_tiny.fb_in1k",
    "deit_tiny_patch16_224.fb_in1k",
    "vit_small_patch16_224.augreg_in1k",
)
_HEADERS = ["Model", "Time, ms", "Weights, MB", "Activations, MB", "Params, M", "Explained"]
_KEPT_SECONDS = 1800
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

_Kept = list[tuple[Any, np.ndarray, str]]  # view, map and label of each model


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    if host.settings.model is not None:
        from .seeing import check

        check(host, host.settings.model)
    kept, layers = (gr.State([], time_to_live=_KEPT_SECONDS) for _ in range(2))
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image, sample = picture("see", _KIND)
            controls = _controls(host)
            run = gr.Button("Look at it", variant="primary", elem_id="see-run")
        with gr.Column(scale=3, min_width=300):
            slider = gr.ImageSlider(
                label="Picture and map, or two models", elem_id="see-slider", max_height=520, buttons=["fullscreen"]
            )
            with gr.Row():
                labels = [
                    gr.Label(label=name, num_top_classes=5, elem_id=f"see-{at}", visible=at == "first", min_width=240)
                    for name, at in (("Model", "first"), ("Second model", "second"))
                ]
            costs = gr.Dataframe(headers=_HEADERS, label="Costs of one picture", elem_id="see-costs", interactive=False)
            with gr.Row():
                downloads = [
                    gr.DownloadButton(name, elem_id=f"see-{at}", size="sm")
                    for name, at in (("Map, PNG", "png"), ("Second map, PNG", "png2"), ("Rows, CSV", "csv"))
                ]
            facts = gr.JSON(label="All of it as JSON", visible=False)
    inputs = [image, sample, *controls.values()]
    event = run.click(
        _looker(host), inputs, [slider, *labels, costs, *downloads, facts, kept, layers], api_name="see", **host.heavy
    )
    _keep_opacity(controls["opacity"], kept, [slider, *downloads[:2]])
    event.success(  # an empty box for the model that was not asked says nothing
        lambda kept: gr.Label(visible=len(kept) > 1), kept, labels[1], queue=False, **_PRIVATE
    )
    link = {"sample": sample, **controls}
    write(event, link)
    _attending(host, image, sample, controls, event, kept, layers)
    restore(blocks, link, "see-run")


def _controls(host: Host) -> dict[str, Any]:
    """The controls beside the picture, by the names of the API."""
    given = [host.settings.model] if host.settings.model else []
    names: list[str] = list(dict.fromkeys([*given, *_names()]))
    model = gr.Dropdown(
        names, value=host.settings.model or DEFAULT_MODEL, label="Model", elem_id="see-model", allow_custom_value=True,
        info="Ours, or any name of timm's; what is not here yet is fetched",
    )  # fmt: skip
    other = gr.Dropdown(["", *names], value="", label="Second model", elem_id="see-other", allow_custom_value=True)
    with gr.Accordion("More", open=False):
        method = gr.Radio(_METHODS, value="auto", label="How the map is made", elem_id="see-method")
        target = gr.Textbox(
            "", label="Class to explain", placeholder="the likeliest", max_length=200, elem_id="see-target"
        )
        untrained = gr.Checkbox(
            label="Untrained weights",
            elem_id="see-untrained",
            info="Where a model's own are not here: its machinery alone, what it says means nothing",
        )
    opacity = gr.Slider(0, 1, value=0.6, step=0.05, label="Opacity of the map", elem_id="see-opacity")
    return {
        "model": model, "other": other, "method": method, "target": target, "untrained": untrained, "opacity": opacity
    }  # fmt: skip


def _names() -> list[str]:
    """Models to choose from: those that are here whatever happens, ours, and some of timm's."""
    ours = json.loads(resources.files("apps").joinpath("sizes.json").read_text(encoding="utf-8"))
    no_classes = ("_seg", "_ocr")
    return [DEFAULT_MODEL, *weights.shipped_classifiers(), *(n for n in ours if not n.endswith(no_classes)), *_OF_TIMM]


def _looker(host: Host) -> Any:
    def see(
        image: str | None = None,
        sample: str = "",
        model: str = DEFAULT_MODEL,
        other: str = "",
        method: str = "auto",
        target: str = "",
        untrained: bool = False,
        opacity: float = 0.6,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio is asked for it
    ) -> tuple[Any, ...]:
        """What one or two vision models see in a picture: the likeliest classes and a map of the evidence.

        Args:
            image: The picture, a file.
            sample: Name of a sample to take instead, such as "cat".
            model: Name of a model, of this suite or of timm's.
            other: A second one to compare with, or "".
            method: How the map is made: "auto", "attention", "activation" or "rollout".
            target: Class to explain, by name or index; "" for the likeliest.
            untrained: Take random weights where a model's own are not on the server.
            opacity: Of the map over the picture, from 0 to 1.
        """
        with said():
            from .seeing import borrowed, look

            read = chosen(image, sample, _KIND, host.settings)
            seen = []
            for name in [model, other] if (other or "").strip() else [model]:
                with borrowed(host, name or "", untrained, progress) as stage:
                    seen.append(look(stage, read, target or "", cast(Any, method)))
            kept: _Kept = [(one.view, one.heat, one.label) for one in seen]
            classes = [dict(one.classes) or None for one in seen] + [None] * (2 - len(seen))
            rows = [_row(one) for one in seen]
            drawn, files = _drawn(kept, opacity)
            table = handed_out("seen.csv", as_csv([{k: v for k, v in row.items() if k != "classes"} for row in rows]))
            costs = [[row[key] for key in ("model", *_COSTS, "target")] for row in rows]
            return drawn, *classes, costs, *files, table, {"models": rows}, kept, seen[0].layers

    return see


_COSTS = ("milliseconds", "weights_mb", "activations_mb", "params")


def _row(seen: Any) -> dict[str, Any]:
    """What a model made of the picture, as it is handed to programs."""
    costs = {name: getattr(seen.costs, name) for name in _COSTS}
    ranks: dict[str, Any] = {}
    for number, (label, probability) in enumerate(seen.classes.items(), 1):
        ranks |= {f"label_{number}": label, f"prob_{number}": probability}
    return {"model": seen.label, **costs, "target": seen.target, **ranks, "classes": dict(seen.classes)}


def _drawn(kept: _Kept, opacity: float) -> tuple[tuple[np.ndarray, np.ndarray], list[str | None]]:
    """The two sides of the slider, and the files of the maps."""
    from .seeing import overlay

    maps = [overlay(view, heat, min(max(float(opacity), 0.0), 1.0)) for view, heat, _ in kept]
    sides = (kept[0][0].picture, maps[0]) if len(maps) == 1 else (maps[0], maps[1])
    files: list[str | None] = [handed_out(f"map_{number}.png", as_png(one)) for number, one in enumerate(maps, 1)]
    return sides, files + [None] * (2 - len(files))


def _keep_opacity(opacity: gr.Slider, kept: gr.State, outputs: Sequence[Any]) -> None:
    """Moving the slider draws the maps anew, without asking the models."""

    def fade(kept: _Kept, opacity: float) -> list[Any]:
        with said():
            if not kept:
                return [gr.skip()] * len(outputs)
            sides, files = _drawn(kept, opacity)
            return [sides, *files]

    opacity.release(fade, [kept, opacity], [*outputs], **_PRIVATE)


def _attending(
    host: Host, image: Any, sample: Any, controls: dict[str, Any], looked: Any, kept: gr.State, layers: gr.State
) -> None:
    """The part of the page about one place of the picture."""
    gr.Markdown("## Where a place attends\nClick a place of the picture, or give it in per cent.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            x = gr.Slider(0, 100, value=50, step=1, label="From the left, %", elem_id="see-x")
            y = gr.Slider(0, 100, value=50, step=1, label="From above, %", elem_id="see-y")
            layer = gr.Dropdown(
                [("last", "")], value="", label="Layer of attention", elem_id="see-layer", allow_custom_value=True
            )
            connectivity = gr.Checkbox(
                label="Only which places are attended to at all (routed regions, kept keys)", elem_id="see-connectivity"
            )
            run = gr.Button("Show", elem_id="see-attend")
        with gr.Column(scale=3, min_width=300):
            spot = gr.Image(
                label="Where it attends", elem_id="see-spot", interactive=False, height=420, buttons=["download"]
            )
            stages = gr.Gallery(
                label="Connected, stage by stage", elem_id="see-stages", columns=4, height=220, visible=False
            )
            facts = gr.JSON(label="All of it as JSON", visible=False)
    inputs = [image, sample, controls["model"], x, y, layer, connectivity, controls["untrained"], controls["opacity"]]
    shown = run.click(_attender(host), inputs, [spot, stages, facts], api_name="attend", **host.heavy)

    def begin(kept: _Kept, layers: list[str]) -> list[Any]:
        return [kept[0][0].picture, gr.Dropdown([("last", ""), *layers], value="")]

    looked.success(begin, [kept, layers], [spot, layer], queue=False, **_PRIVATE)

    def click(kept: _Kept, event: gr.SelectData) -> list[Any]:
        if not kept:
            return [gr.skip(), gr.skip()]
        height, width = kept[0][0].picture.shape[:2]
        return [round(100 * event.index[0] / width), round(100 * event.index[1] / height)]

    placed = spot.select(click, kept, [x, y], queue=False, **_PRIVATE)
    clicked = placed.then(_attender(host), inputs, [spot, stages, facts], api_visibility="private", **host.heavy)
    for event in (shown, clicked):  # an empty gallery would be a large nothing
        event.success(lambda facts: gr.Gallery(visible=facts["stages"] > 0), facts, stages, queue=False, **_PRIVATE)


def _attender(host: Host) -> Any:
    def attend(
        image: str | None = None,
        sample: str = "",
        model: str = DEFAULT_MODEL,
        x: float = 50,
        y: float = 50,
        layer: str = "",
        connectivity: bool = False,
        untrained: bool = False,
        opacity: float = 0.6,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio is asked for it
    ) -> tuple[Any, ...]:
        """Where one place of a picture attends in a layer of a vision model.

        Args:
            image: The picture, a file.
            sample: Name of a sample to take instead, such as "cat".
            model: Name of a model that attends.
            x: The place from the left, in per cent of the width.
            y: The place from above, in per cent of the height.
            layer: Name or index of the layer; "" for the last.
            connectivity: Which places are attended to at all, instead of how much.
            untrained: Take random weights where a model's own are not on the server.
            opacity: Of the map over the picture, from 0 to 1.
        """
        with said():
            from .seeing import attend as attended_from
            from .seeing import borrowed, connected, marked, overlay

            read = chosen(image, sample, _KIND, host.settings)
            with borrowed(host, model or "", untrained, progress) as stage:
                view, heat = attended_from(stage, read, x, y, layer or "", connectivity)
                every = connected(stage, read, x, y)
                label = stage.network.label
            shade = min(max(float(opacity), 0.0), 1.0)
            pictures = [(marked(overlay(seen, one, shade), x, y), name) for name, seen, one in every]
            share = round(float((heat > 0).mean()), 4)
            facts = {"model": label, "x": x, "y": y, "layer": layer or "last", "share": share, "stages": len(every)}
            return marked(overlay(view, heat, shade), x, y), pictures, facts

    return attend
