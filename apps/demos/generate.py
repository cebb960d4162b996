"""Generate: text to images, plain and with each subject kept in a place of its own."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from .curves import curves
from .downloads import as_csv, handed_out, within_html
from .host import Host, said
from .painting import COLOURS, editor, regions
from .permalink import restore, write
from .subjects import MOST_LETTERS, among, joined, kept, legend, nouns, words

if TYPE_CHECKING:
    from PIL.Image import Image

    from .generating import Drawn, Order

__all__ = ["ABOUT", "TITLE", "page"]

TITLE = "Generate"
ABOUT = "Text to images in which no subject gets lost: plain beside A-STAR and Attend-and-Excite, from the same noise."

_METHODS = ("plain", "A-STAR", "Attend-and-Excite")
_SHIPPED_EXAMPLES = (  # with seeds of which the plain picture lacks something that A-STAR's has
    ("a red circle and a blue square", ["circle", "square"], 1),
    ("a green triangle and a yellow diamond", ["triangle", "diamond"], 12),
    ("a blue square and a yellow diamond", ["square", "diamond"], 14),
)
_EXAMPLES = (
    ("a cat and a frog", ["cat", "frog"], 0),
    ("a red car and a blue bench", ["car", "bench"], 0),
    ("a lion with a crown", ["lion", "crown"], 0),
)
_NOTE = """The model that ships knows a red circle, a blue square, a green triangle and a yellow diamond on 32 × 32
pixels, and often loses one of two: there is something to guide. Any Stable Diffusion takes its place with
`attnsuite demo generate --model OWNER/NAME`."""
_REGIONS = """Where subjects shall be, for A-STAR; the plain picture stays as it is. Regions stay out of the link."""
_SHOWN_SIDE = 256
_VIRIDIS = "#440154,#3b528b,#21918c,#5ec962,#fde725"
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    note, suits = _NOTE, {"steps": 15, "guidance_scale": 3}
    if host.settings.model is not None:
        from ..generate.models import find

        model = find(host.settings.model)
        suits = {"steps": 50, **model.suits}
        if not model.shipped:
            folder = Path(host.settings.model).expanduser()
            note = f"Drawing is <code>{html.escape(folder.name if folder.is_dir() else model.name)}</code>."
    gr.Markdown(note)
    drawn = gr.State([], time_to_live=1800)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            controls = _controls(suits, note == _NOTE)
            with gr.Row():
                run = gr.Button("Draw", variant="primary", elem_id="generate-run", min_width=120)
                stop = gr.Button("Stop", elem_id="generate-stop", min_width=120)
        with gr.Column(scale=3, min_width=300):
            outputs = _outputs()
            step, maps = outputs.pop("step"), outputs.pop("maps")
    status = outputs["status"]
    event = gr.on(
        [run.click, controls["prompt"].submit],
        _drawer(host),
        [*controls.values()],
        [*outputs.values(), drawn],
        api_name="generate",
        show_progress="minimal",
        show_progress_on=status,
        **host.heavy,
    )
    stopped = stop.click(None, None, None, cancels=[event], **_PRIVATE)
    stopped.then(lambda: "Stopped.", None, status, **_PRIVATE)
    event.success(_last_step, drawn, step, **_PRIVATE).then(_maps, [drawn, step], maps, **_PRIVATE)
    step.input(_maps, [drawn, step], maps, trigger_mode="always_last", **_PRIVATE)
    link = {name: controls[name] for name in controls if name not in ("layout", "painted")}
    write(event, link)
    restore(blocks, link, "generate-run")


def _controls(suits: dict[str, Any], shipped: bool) -> dict[str, Any]:
    """The controls, by the names of the API."""
    offered = _SHIPPED_EXAMPLES if shipped else _EXAMPLES
    first, found, its_seed = offered[0]
    prompt = gr.Textbox(first, label="Prompt", max_length=MOST_LETTERS, elem_id="generate-prompt")
    samples = [[one] for one, _, _ in offered]
    examples = gr.Dataset(
        components=[prompt], samples=samples, label="Examples", type="index", elem_id="generate-examples"
    )
    clicked = gr.CheckboxGroup(
        words(first), value=found, label="Click the words that are subjects", elem_id="generate-words",
        info="As you type, the things that the model knows are chosen for you." if shipped else None,
    )  # fmt: skip
    subjects = gr.Dropdown(
        words(first), value=found, multiselect=True, allow_custom_value=True, elem_id="generate-subjects",
        label="Subjects", info="Type here for one of several words, such as: fire truck",
    )  # fmt: skip
    # Gradio would tell programs that the words of the first prompt are all that there can be
    any_words = {"type": "array", "items": {"type": "string"}}
    setattr(subjects, "api_info", lambda: any_words)  # noqa: B010 - of this one
    methods = gr.CheckboxGroup(_METHODS, value=["plain", "A-STAR"], label="Methods", elem_id="generate-methods")
    with gr.Row():
        seed = gr.Number(
            its_seed, label="Seed", minimum=0, maximum=2**31 - 1, precision=0, elem_id="generate-seed", min_width=120
        )
        steps = gr.Slider(1, 100, value=suits["steps"], step=1, label="Steps", elem_id="generate-steps", min_width=180)
        scale = gr.Slider(
            0, 20, value=suits["guidance_scale"], step=0.5, label="Guidance scale", elem_id="generate-scale",
            min_width=180,
        )  # fmt: skip
    layout, painted = _regions(subjects)
    _follow(prompt, clicked, subjects, shipped)

    def picked(at: int) -> list[Any]:
        text, its_subjects, its_seed = offered[at]
        return [text, gr.Dropdown(words(text), value=its_subjects), its_seed]

    examples.click(picked, examples, [prompt, subjects, seed], **_PRIVATE)
    return {
        "prompt": prompt, "subjects": subjects, "methods": methods, "seed": seed, "steps": steps,
        "guidance_scale": scale, "layout": layout, "painted": painted,
    }  # fmt: skip


def _regions(subjects: gr.Dropdown) -> tuple[gr.Textbox, gr.ImageEditor]:
    with gr.Accordion("Regions: paint where subjects shall be", open=False, elem_id="generate-places"):
        gr.Markdown(_REGIONS)
        key = gr.HTML(legend(subjects.value or [], COLOURS), elem_id="generate-legend")
        painted = editor("Painted regions", elem_id="generate-regions", height=380)
        layout = gr.Textbox(
            "", label="Or written, as JSON", placeholder='{"circle": [0, 0, 0.5, 1]}', max_length=2000,
            elem_id="generate-layout", info="Left, top, right and bottom, from 0 to 1",
        )  # fmt: skip
    subjects.change(lambda chosen: legend(_texts(chosen), COLOURS), subjects, key, **_PRIVATE)
    return layout, painted


def _follow(prompt: gr.Textbox, clicked: gr.CheckboxGroup, subjects: gr.Dropdown, shipped: bool) -> None:
    """Words to click are those of the prompt, and what is clicked are subjects."""

    def typed(text: str, before: Any) -> Any:
        chosen = kept(text, _texts(before))
        return gr.Dropdown(words(text), value=[*dict.fromkeys([*chosen, *(nouns(text) if shipped else [])])])

    def changed(text: str, before: Any) -> Any:
        # Gradio takes what is typed right after an example was picked for a part of that
        gone = len(kept(text, _texts(before))) < len(_texts(before))
        return typed(text, before) if gone else gr.skip()

    def shown(text: str, chosen: Any) -> Any:
        return gr.CheckboxGroup(words(text), value=among(text, _texts(chosen)))

    def clicks(text: str, chosen: Any, before: Any) -> list[str]:
        return joined(text, _texts(chosen), _texts(before))

    prompt.input(typed, [prompt, subjects], subjects, trigger_mode="always_last", **_PRIVATE)
    prompt.change(changed, [prompt, subjects], subjects, trigger_mode="always_last", **_PRIVATE)
    gr.on([prompt.change, subjects.change], shown, [prompt, subjects], clicked, trigger_mode="always_last", **_PRIVATE)
    clicked.input(clicks, [prompt, clicked, subjects], subjects, **_PRIVATE)


def _texts(given: Any) -> list[str]:
    """What a control gives, which programs may fill with anything."""
    return [one.strip() for one in given if isinstance(one, str)] if isinstance(given, list) else []


def _outputs() -> dict[str, Any]:
    status = gr.Textbox(
        "Draw, and pictures of the same noise come here.", label="Progress", elem_id="generate-status",
        interactive=False, max_lines=3,
    )  # fmt: skip
    pictures = gr.Gallery(
        label="Pictures", elem_id="generate-pictures", columns=3, rows=1, object_fit="contain", height="max-content",
        format="png", interactive=False, buttons=["download", "fullscreen"],
    )  # fmt: skip
    step = gr.Slider(
        1, 100, value=1, step=1, label="Attention to each subject, at step", elem_id="generate-step", visible=False
    )
    maps = gr.HTML(label="Maps", elem_id="generate-maps")
    losses = gr.HTML(label="Losses, drawn", elem_id="generate-losses")
    with gr.Row():
        table = gr.DownloadButton("Losses, CSV", elem_id="generate-csv", size="sm", min_width=140)
        archive = gr.DownloadButton("Pictures and maps, ZIP", elem_id="generate-zip", size="sm", min_width=140)
    facts = gr.JSON(label="All of it as JSON", visible=False)
    return {
        "status": status, "pictures": pictures, "step": step, "maps": maps, "losses": losses, "table": table,
        "archive": archive, "facts": facts,
    }  # fmt: skip


def _drawer(host: Host) -> Any:
    def generate(
        prompt: str,
        subjects: list[str],
        methods: list[str],
        seed: int,
        steps: int,
        guidance_scale: float,
        layout: str = "",
        painted: Any = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio is asked for it
    ) -> Iterator[tuple[Any, ...]]:
        """Pictures of a prompt, plain and with guided attention, from the same noise.

        Args:
            prompt: What to draw.
            subjects: Words of the prompt that each get a place of their own, such as ["circle", "square"].
            methods: Some of "plain", "A-STAR", "Attend-and-Excite".
            seed: Of the noise.
            steps: Of the sampler, 1 to 100.
            guidance_scale: Of classifier-free guidance, 0 to 20.
            layout: Where subjects shall be, JSON such as {"circle": [0, 0, 0.5, 1]}; "" for anywhere.
            painted: The same painted, as gr.ImageEditor has it; null for nothing.
        """
        with said():
            from .generating import order

            named = [one.strip() for one in subjects.split(",")] if isinstance(subjects, str) else subjects or []
            places = regions(painted, named, layout or "")
            wanted = order(host, prompt or "", named, seed, steps, guidance_scale, methods or [], places)
            yield from _told(host, wanted, progress)

    return generate


def _told(host: Host, wanted: Order, progress: gr.Progress) -> Iterator[tuple[Any, ...]]:
    """What the outputs show, step by step; all of them at the end."""
    from .generating import Drawn, Note, Step, drawn_by

    drawn: list[Drawn] = []
    pictures: list[tuple[Image, str]] = []
    notes: list[str] = []
    status = "Waiting"
    for what in drawn_by(host, wanted):
        if isinstance(what, Drawn):
            drawn.append(what)
            pictures.append((_enlarged(what.image), what.method))
        elif isinstance(what, Note):
            notes.append(what.text)
        elif isinstance(what, Step):
            status = f"Step {what.done} of {what.steps}, {what.method}"
            progress((what.done, what.steps), desc=status, unit="steps")
        elif what is not None:
            status = what
            progress(0, desc=status)
        yield status, [*pictures] if isinstance(what, Drawn) else gr.skip(), *[gr.skip()] * 5
    yield " ".join(["Done.", *notes]), pictures, *_results(drawn), _facts(wanted, drawn, notes), drawn


def _enlarged(image: Image) -> Image:
    """A small picture with each pixel as a square, and a large one as it is."""
    times = max(1, _SHOWN_SIDE // max(image.size))
    return image.resize((image.width * times, image.height * times), 0)


def _results(drawn: Sequence[Drawn]) -> tuple[Any, ...]:
    """The curves, and files of everything."""
    from .generating import packed

    rows = [
        {"method": one.method, "step": step + 1, **{name: float(values[step]) for name, values in one.losses.items()}}
        for one in drawn
        if one.maps is not None
        for step in range(len(one.maps))
    ]
    lines = curves({one.method: {name: [*map(float, own)] for name, own in one.losses.items()} for one in drawn})
    table = handed_out("losses.csv", as_csv(rows)) if rows else None
    return lines, table, handed_out("generated.zip", packed(drawn))


def _facts(wanted: Order, drawn: Sequence[Drawn], notes: Sequence[str]) -> dict[str, Any]:
    settings = wanted.settings
    losses = {
        one.method: {
            name: [round(float(value), 6) if math.isfinite(value) else None for value in values]
            for name, values in one.losses.items()
        }
        for one in drawn
    }
    return {
        "prompt": settings.prompt, "subjects": list(settings.subjects), "model": settings.model, "seed": settings.seed,
        "steps": settings.steps, "guidance_scale": settings.guidance_scale, "methods": list(wanted.methods),
        "notes": list(notes), "losses": losses,
    }  # fmt: skip


def _last_step(drawn: Sequence[Drawn]) -> Any:
    steps = max((len(one.maps) for one in drawn if one.maps is not None), default=0)
    return gr.Slider(maximum=max(steps, 2), value=max(steps, 1), visible=steps > 0)


def _maps(drawn: Sequence[Drawn] | None, step: float) -> str:
    """The maps of one step as HTML: a row for each method, a column for each subject."""
    with said():
        from .generating import maps_at

        rows, largest = maps_at(drawn or [], int(step or 1))
        if not rows:
            return ""
        cells = ""
        for method, maps in rows:
            for subject, picture in maps:
                name = f"{html.escape(method)}: {html.escape(subject)}"
                cells += (
                    f'<figure style="margin:0;min-width:0"><img src="{within_html(picture)}" alt="{name}" '
                    f'style="width:100%;border-radius:.3rem"><figcaption style="overflow-wrap:anywhere">{name}'
                    "</figcaption></figure>"
                )
        bar = f"width:6rem;height:.7rem;border-radius:.2rem;background:linear-gradient(90deg,{_VIRIDIS})"
        scale = (
            '<p style="display:flex;gap:.5rem;align-items:center;margin:0 0 .4rem">0 '
            f'<span style="{bar}"></span> {largest:.2f}, one scale for all steps</p>'
        )
        columns = f"repeat({len(rows[0][1])},minmax(0,14rem))"
        return f'{scale}<div style="display:grid;grid-template-columns:{columns};gap:.6rem">{cells}</div>'
