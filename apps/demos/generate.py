"""Generate: text to images, plain and with each subject kept in a place of its own."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from .downloads import as_csv, handed_out, picture_file
from .host import Host, said
from .permalink import restore, write

__all__ = ["ABOUT", "TITLE", "page"]

TITLE = "Generate"
ABOUT = "Text to images in which no subject gets lost: plain beside A-STAR and Attend-and-Excite, from the same noise."

_METHODS = ("plain", "A-STAR", "Attend-and-Excite")
_PROMPTS = (
    "a red circle and a blue square",
    "a green triangle and a yellow diamond",
    "a blue square and a yellow diamond",
)
_NOTE = """The model that comes with the suite knows a red circle, a blue square, a green triangle and a yellow
diamond on 32 × 32 pixels, and often loses one of two: there is something to guide. Any Stable Diffusion takes its place
with `attnsuite demo generate --model OWNER/NAME`."""
# Okabe and Ito's colours, in the order of the subjects.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7")
_CANVAS = 256
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    if host.settings.model is not None:
        from ..generate.models import find

        find(host.settings.model, may_fetch=True)
    gr.Markdown(_NOTE)
    kept = gr.State([], time_to_live=1800)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls = _controls()
            painted = _regions()
            with gr.Row():
                run = gr.Button("Draw", variant="primary", elem_id="generate-run")
                stop = gr.Button("Stop", elem_id="generate-stop")
        with gr.Column(scale=3, min_width=300):
            outputs = _outputs()
    event = run.click(
        _drawer(host),
        [*controls.values(), painted],
        [*outputs.values(), kept],
        api_name="generate",
        **host.heavy,
    )
    stopped = stop.click(None, None, None, cancels=[event], **_PRIVATE)
    stopped.then(lambda: "Stopped.", None, outputs["status"], **_PRIVATE)
    _over_time(event, kept)
    link = {name: control for name, control in controls.items() if name != "layout"}
    write(event, link)
    restore(blocks, link, "generate-run")


def _controls() -> dict[str, Any]:
    """The controls, by the names of the API; the words of the prompt set the subjects when they are clicked."""
    prompt = gr.Textbox(_PROMPTS[0], label="Prompt", lines=2, max_length=300, elem_id="generate-prompt")
    gr.Examples([[one] for one in _PROMPTS], prompt, label="Examples", elem_id="generate-examples")
    words = gr.CheckboxGroup(
        ["red", "circle", "blue", "square"], value=["circle", "square"], label="Click the words that are subjects",
        elem_id="generate-words",
    )  # fmt: skip
    subjects = gr.Textbox(
        "circle, square", label="Subjects, separated by commas", max_length=300, elem_id="generate-subjects"
    )
    methods = gr.CheckboxGroup(_METHODS, value=["plain", "A-STAR"], label="Methods", elem_id="generate-methods")
    with gr.Row():
        seed = gr.Number(
            0, label="Seed", minimum=0, maximum=2**31 - 1, precision=0, elem_id="generate-seed", min_width=90
        )
        steps = gr.Slider(1, 100, value=15, step=1, label="Steps", elem_id="generate-steps", min_width=160)
    guidance_scale = gr.Slider(1, 20, value=3, step=0.5, label="Guidance scale", elem_id="generate-scale")
    layout = gr.Textbox(
        "", label="Regions as JSON", placeholder='{"circle": [0, 0, 0.5, 1]}', max_length=2000,
        elem_id="generate-layout",
        info="Left, top, right, bottom, in fractions of the picture; or paint them below",
    )  # fmt: skip

    def split(prompt: str, before: str) -> list[Any]:
        from .generating import nouns, words

        found = words(prompt)
        known = nouns(prompt) or [word.strip() for word in before.split(",") if word.strip() in found]
        return [gr.CheckboxGroup(found, value=known), ", ".join(known)]

    prompt.input(split, [prompt, subjects], [words, subjects], queue=False, **_PRIVATE)
    prompt.change(
        lambda prompt, subjects: gr.CheckboxGroup(_words(prompt), value=_chosen(prompt, subjects)),
        [prompt, subjects], words, queue=False, **_PRIVATE,
    )  # fmt: skip
    words.input(lambda chosen: ", ".join(chosen), words, subjects, queue=False, **_PRIVATE)
    return {
        "prompt": prompt, "subjects": subjects, "methods": methods, "seed": seed, "steps": steps,
        "guidance_scale": guidance_scale, "layout": layout,
    }  # fmt: skip


def _words(prompt: str) -> list[str]:
    from .generating import words

    return words(prompt)


def _chosen(prompt: str, subjects: str) -> list[str]:
    """Those of the subjects that are single words of the prompt."""
    return [word for word in _words(prompt) if word in [one.strip() for one in subjects.split(",")]]


def _regions() -> gr.ImageEditor:
    with gr.Accordion("Paint where subjects shall be", open=False):
        names = ", ".join(("orange", "blue", "green", "pink"))
        gr.Markdown(f"One colour for each subject, in the order of their names: {names}.")
        return gr.ImageEditor(
            np.full((_CANVAS, _CANVAS, 3), 255, np.uint8), label="Regions", elem_id="generate-regions", type="numpy",
            brush=gr.Brush(default_size=40, colors=list(_COLOURS), default_color=_COLOURS[0], color_mode="fixed"),
            sources=(), transforms=(), layers=False, canvas_size=(_CANVAS, _CANVAS), height=380,
        )  # fmt: skip


def _outputs() -> dict[str, Any]:
    status = gr.Textbox(label="Progress", elem_id="generate-status", interactive=False, max_lines=3)
    pictures = gr.Gallery(
        label="Pictures", elem_id="generate-pictures", columns=3, object_fit="contain", height=320, buttons=["download"]
    )
    curves = gr.Gallery(
        label="Maps and losses over time", elem_id="generate-curves", columns=2, object_fit="contain", height=360
    )
    with gr.Row():
        table = gr.DownloadButton("Losses, CSV", elem_id="generate-csv", size="sm")
        sheet = gr.DownloadButton("Pictures side by side, PNG", elem_id="generate-png", size="sm")
    facts = gr.JSON(label="All of it as JSON", visible=False)
    return {"status": status, "pictures": pictures, "curves": curves, "table": table, "sheet": sheet, "facts": facts}


def _drawer(host: Host) -> Any:
    def generate(
        prompt: str,
        subjects: str,
        methods: list[str],
        seed: float,
        steps: float,
        guidance_scale: float,
        layout: str,
        painted: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio is asked for it
    ) -> Iterator[tuple[Any, ...]]:
        """Pictures of a prompt, plain and with guided attention, from the same noise.

        Args:
            prompt: What to draw.
            subjects: Words of the prompt that each get a place of their own, separated by commas.
            methods: Some of "plain", "A-STAR", "Attend-and-Excite".
            seed: Of the noise.
            steps: Of the sampler, 1 to 100.
            guidance_scale: Of classifier-free guidance.
            layout: Where subjects shall be, JSON such as {"circle": [0, 0, 0.5, 1]}; "" for anywhere.
            painted: The same painted, as gr.ImageEditor has it; null for nothing.
        """
        with said():
            from .generating import Drawn, Step, drawn_by, order, regions

            named = [one.strip() for one in (subjects or "").split(",") if one.strip()]
            places = regions(painted, named, _COLOURS, layout or "")
            wanted = order(host, prompt or "", subjects or "", seed, steps, guidance_scale, methods or [], places)
            drawn: list[Drawn] = []
            note = ""
            for what in drawn_by(host, wanted):
                if isinstance(what, Drawn):
                    drawn.append(what)
                    continue
                if isinstance(what, Step):
                    progress((what.done, what.steps), desc=what.method, unit="steps")
                    status = f"{what.method}: step {what.done} of {what.steps}"
                else:
                    status = what
                    note = f" {what}" if "does not know" in what else note
                yield status, *[gr.skip()] * 6
            yield f"Done.{note}", *_shown(drawn), _facts(wanted, drawn), drawn

    return generate


def _shown(drawn: Sequence[Any]) -> tuple[Any, ...]:
    """Pictures, curves, and files of both."""
    scaled = [(one.image.resize([max(256, side) for side in one.image.size], 0), one.method) for one in drawn]
    curves = [(one.grid, one.method) for one in drawn if one.grid is not None]
    rows = [
        {"method": one.method, "step": step + 1, **{name: float(values[step]) for name, values in one.losses.items()}}
        for one in drawn
        for step in range(len(next(iter(one.losses.values()), ())))
    ]
    table = handed_out("losses.csv", as_csv(rows)) if rows else None
    side_by_side = np.hstack([np.asarray(image.convert("RGB")) for image, _ in scaled])
    return scaled, curves, table, picture_file("pictures.png", side_by_side)


def _facts(wanted: Any, drawn: Sequence[Any]) -> dict[str, Any]:
    settings = wanted.settings
    losses = {
        one.method: {name: [round(float(value), 6) for value in values] for name, values in one.losses.items()}
        for one in drawn
    }
    return {
        "prompt": settings.prompt, "subjects": list(settings.subjects), "model": settings.model, "seed": settings.seed,
        "steps": settings.steps, "guidance_scale": settings.guidance_scale, "methods": list(wanted.methods),
        "losses": losses,
    }  # fmt: skip


def _over_time(event: Any, kept: gr.State) -> None:
    """The maps of the subjects at any step, without drawing again."""
    gr.Markdown("## Where each subject is, step by step")
    step = gr.Slider(1, 100, value=1, step=1, label="Step", elem_id="generate-step")
    maps = gr.Gallery(label="Attention to each subject", elem_id="generate-maps", columns=4, height=300)

    def show(drawn: Any, step: float) -> Any:
        with said():
            from .generating import maps_at

            return [(picture, html.escape(name)) for picture, name in maps_at(drawn or [], int(step))]

    def ready(drawn: Any) -> Any:
        steps = max((len(one.maps) for one in drawn if one.maps is not None), default=1)
        return gr.Slider(maximum=max(steps, 2), value=steps)

    done = event.success(ready, kept, step, queue=False, **_PRIVATE)
    done.then(show, [kept, step], maps, **_PRIVATE)
    step.release(show, [kept, step], maps, **_PRIVATE)
