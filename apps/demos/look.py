"""Look: where a searcher might look for something in a picture, beside where people did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import gradio as gr

from ..batch.decode import Unreadable
from ..errors import UsageError
from .downloads import as_csv, handed_out
from .host import Host, said
from .permalink import restore, write
from .uploads import chosen, picture

if TYPE_CHECKING:
    from .looking import Looked

__all__ = ["ABOUT", "TITLE", "page"]

TITLE = "Look"
ABOUT = "Where a searcher might look for something in your picture, fixation by fixation."

_KIND = "shelves"
_NOTE = """The model that comes with the suite has learned from drawn shelves like the samples, not from people: on
photographs take it as a demonstration. It knows objects by row and column; boxes that lie freely are given the fraction
of a row and a column that their centre has in the grid."""
_HEADERS = ["Metric", "Model and people", "People among each other", "What it means"]
_WIDTHS: list[int | str] = [150, 110, 110, 280]
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_TARGET, _CORNER = "sets the target", "is a corner of a box: two clicks make one"


class _Kept(NamedTuple):
    """What a visitor has searched, for going through it step by step."""

    image: str | None
    sample: str
    looked: Looked
    people: int


def page(host: Host, blocks: gr.Blocks) -> None:
    """Draws the page.

    Args:
        host: The server.
        blocks: What holds the page.
    """
    if host.settings.model is not None:
        from ..scanpath.command import OATChoice

        OATChoice(host.settings.model).resolve()
    gr.Markdown(_NOTE)
    kept = gr.State(None, time_to_live=1800)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            image, sample = picture("look", _KIND)
            controls, clicks, scene = _controls()
            run = gr.Button("Search", variant="primary", elem_id="look-run")
        with gr.Column(scale=3, min_width=300):
            outputs = _outputs()
    inputs = {"image": image, "sample": sample, **controls}
    event = run.click(_looker(host), [*inputs.values()], [*outputs.values(), kept], api_name="look", **host.heavy)
    _stepping(host, kept, outputs)
    _clicking(host, inputs, clicks, scene)
    link = {name: inputs[name] for name in _LINKED}
    write(event, link)
    restore(blocks, link, "look-run")


_LINKED = ("sample", "rows", "columns", "target", "boxes", "num_scanpaths", "temperature", "max_refixations", "seed")


def _controls() -> tuple[dict[str, Any], gr.Radio, gr.Image]:
    """The controls below the picture, by the names of the API; what a click does; the picture to click on."""
    with gr.Row():
        rows = gr.Number(3, label="Rows", minimum=1, maximum=40, precision=0, elem_id="look-rows", min_width=80)
        columns = gr.Number(
            9, label="Columns", minimum=1, maximum=40, precision=0, elem_id="look-columns", min_width=80
        )
        target = gr.Textbox("2, 5", label="Target", max_length=80, elem_id="look-target", min_width=80)
    gr.Markdown("The target is row and column, or number or name of a box.")
    scene = gr.Image(label="Objects and target", elem_id="look-scene", interactive=False, height=220, buttons=[])
    clicks = gr.Radio([_TARGET, _CORNER], value=_TARGET, label="A click on this picture", elem_id="look-clicks")
    with gr.Accordion("Objects that lie freely, people, chance", open=False):
        boxes = gr.Textbox(
            "", label="Boxes instead of a grid", info="One a line: left, upper, right, lower in pixels, name", lines=3,
            max_length=20_000, elem_id="look-boxes",
        )  # fmt: skip
        boxes_file = gr.File(label="… or from a file (.csv, .json, COCO)", elem_id="look-boxes-file", height=100)
        humans = gr.File(label="Where people looked (.csv)", elem_id="look-humans", height=100)
        humans_image = gr.Textbox("", label="Whose picture's scanpaths, if the file has several", max_length=200)
        num_scanpaths = gr.Slider(1, 100, value=20, step=1, label="Scanpaths", elem_id="look-count")
        temperature = gr.Slider(0.1, 5, value=1, step=0.1, label="Temperature: below 1 likelier, above more varied")
        max_refixations = gr.Slider(
            -1, 20, value=-1, step=1, label="Refixations of an object at most; -1 for any number"
        )
        seed = gr.Number(0, label="Seed", minimum=0, maximum=2**31 - 1, precision=0, elem_id="look-seed")
    names = "rows columns target boxes boxes_file humans humans_image num_scanpaths temperature max_refixations seed"
    here = locals()
    return {name: here[name] for name in names.split()}, clicks, scene


def _outputs() -> dict[str, Any]:
    label = "The first few searches, one after another"
    film = gr.Image(label=label, elem_id="look-film", interactive=False, height=300, buttons=[])
    with gr.Row():
        scanpaths = gr.Image(
            label="The first search", elem_id="look-scanpaths", interactive=False, min_width=280, buttons=["download"]
        )
        density = gr.Image(
            label="Where all of them look", elem_id="look-density", interactive=False, min_width=280,
            buttons=["download"],
        )  # fmt: skip
    metrics = gr.Dataframe(
        headers=_HEADERS, label="Beside people", elem_id="look-metrics", interactive=False, wrap=True,
        column_widths=_WIDTHS, visible=False,
    )  # fmt: skip
    with gr.Row():
        names = (("film_file", "Film, GIF"), ("table", "Fixations, CSV"), ("metrics_file", "Metrics, CSV"))
        files = {key: gr.DownloadButton(label, elem_id=f"look-{key}", size="sm") for key, label in names}
    facts = gr.JSON(label="All of it as JSON", visible=False)
    return {"film": film, "scanpaths": scanpaths, "density": density, "metrics": metrics, **files, "facts": facts}


def _looker(host: Host) -> Any:
    def look(
        image: str | None = None,
        sample: str = "",
        rows: float = 3,
        columns: float = 9,
        target: str = "2, 5",
        boxes: str = "",
        boxes_file: str | None = None,
        humans: str | None = None,
        humans_image: str = "",
        num_scanpaths: float = 20,
        temperature: float = 1,
        max_refixations: float = -1,
        seed: float = 0,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how Gradio is asked for it
    ) -> tuple[Any, ...]:
        """Sampled scanpaths of a search for one object of a picture.

        Args:
            image: The picture, a file.
            sample: Name of a sample to take instead, such as "shelf 3 by 9".
            rows: Of the grid of objects.
            columns: Of the grid of objects.
            target: What is searched for: "2, 5" for row and column, or number or name of a box.
            boxes: Objects instead of a grid, one a line: left, upper, right, lower in pixels, name.
            boxes_file: The same as CSV, JSON or COCO's JSON.
            humans: CSV with recorded scanpaths to compare with: scanpath_id, image, target, t, x, y.
            humans_image: Which picture's, if the file has those of several.
            num_scanpaths: How many are sampled, 1 to 100.
            temperature: Below 1 for likelier scanpaths.
            max_refixations: How often an object may be fixated again; -1 for any number.
            seed: Of chance.
        """
        with said():
            from . import looking

            how = _search(num_scanpaths, temperature, max_refixations, seed)
            read, objects, aim = _asked(host, image, sample, rows, columns, boxes, boxes_file, target)
            people = _people(humans, humans_image, read, objects, aim, columns, target)
            looked = looking.search(host, read, objects, aim, how, progress)
            drawn = looking.drawn(read, looked, people)
            compared = looking.likeness(looked, people) if people else []
            return (
                *_shown(drawn, compared),
                _facts(looked, compared, len(people)),
                _Kept(image, sample, looked, len(people)),
            )

    return look


def _search(num_scanpaths: float, temperature: float, max_refixations: float, seed: float) -> Any:
    """How it is searched.

    Raises:
        UsageError: A number that is none.
    """
    from ..scanpath.command import Search
    from .looking import MOST_SCANPATHS

    if None in (num_scanpaths, temperature, max_refixations, seed):
        raise UsageError("a number is missing: scanpaths, temperature, refixations and seed are all needed")
    if not 1 <= num_scanpaths <= MOST_SCANPATHS:
        raise UsageError(f"{num_scanpaths:g} scanpaths: expected 1 to {MOST_SCANPATHS}")
    most = None if max_refixations < 0 else int(max_refixations)
    return Search((1, 1), (0, 0), int(num_scanpaths), float(temperature), most, int(seed))


def _shown(drawn: Mapping[str, Any], compared: list[dict[str, Any]]) -> tuple[Any, ...]:
    rows = [[row[name] for name in ("metric", "model", "people", "means")] for row in compared]
    table = handed_out("metrics.csv", as_csv(compared)) if compared else None
    return drawn["film"], drawn["scanpaths"], drawn["density"], rows, drawn["film"], drawn["table"], table


def _facts(looked: Any, compared: list[dict[str, Any]], people: int) -> dict[str, Any]:
    return {
        "objects": len(looked.objects),
        "target": looked.target + 1,
        "found": round(looked.found, 4),
        "steps": round(looked.steps, 4),
        "scanpaths": [[int(at) + 1 for at in path] for path in looked.paths],
        "people": people,
        "metrics": {row["metric"]: {"model": row["model"], "people": row["people"]} for row in compared},
    }


def _stepping(host: Host, kept: gr.State, outputs: Mapping[str, Any]) -> None:
    """A search at one's own pace; and the table of metrics, which is there if there is something in it."""
    gr.Markdown("## Step by step")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            number = gr.Slider(1, 100, value=1, step=1, label="Which search", elem_id="look-number")
            fixations = gr.Slider(1, 100, value=1, step=1, label="Fixations", elem_id="look-fixations")
        with gr.Column(scale=3, min_width=300):
            shown = gr.Image(label="So far", elem_id="look-step", interactive=False, height=300, buttons=["download"])

    def begin(kept: _Kept | None) -> list[Any]:
        if kept is None:
            return [gr.skip()] * 4
        paths, people = kept.looked.paths, kept.people > 0
        lengths = gr.Slider(maximum=max(2, *map(len, paths)), value=len(paths[0]))
        table = gr.Dataframe(visible=people), gr.DownloadButton(visible=people)
        return [gr.Slider(maximum=max(2, len(paths)), value=1), lengths, *table]

    def show(kept: _Kept | None, number: float, fixations: float) -> Any:
        with said():
            from .looking import step

            if kept is None:
                return gr.skip()
            picture = chosen(kept.image, kept.sample, _KIND, host.settings)
            return step(picture, kept.looked, int(number), int(fixations))

    begun = kept.change(
        begin, kept, [number, fixations, outputs["metrics"], outputs["metrics_file"]], queue=False, **_PRIVATE
    )
    begun.then(show, [kept, number, fixations], shown, **_PRIVATE)
    gr.on([number.release, fixations.release], show, [kept, number, fixations], shown, **_PRIVATE)


def _clicking(host: Host, inputs: Mapping[str, Any], clicks: gr.Radio, scene: gr.Image) -> None:
    """The picture with its objects, kept up to date, and what a click on it does."""
    corner = gr.State(None)
    about = [inputs[name] for name in ("image", "sample", "rows", "columns", "boxes", "boxes_file", "target")]

    def show(*given: Any) -> Any:
        with said():
            if given[0] is None and not given[1]:
                return None
            from .looking import outlined

            try:
                read, objects, aim = _asked(host, *given)
            except (UsageError, Unreadable):  # it is being typed; the search will say what is wrong
                return gr.skip()
            return outlined(read, objects, aim)

    def click(meaning: str, corner: Any, scene: Any, event: gr.SelectData, *given: Any) -> list[Any]:
        with said():
            read, objects, _ = _asked(host, *cast(Any, given[:-1]), target="1")
            scale = read.width / scene.shape[1]
            x, y = (round(scale * at) for at in event.index)
            if meaning == _CORNER:
                if corner is None:
                    return [gr.skip(), gr.skip(), (x, y)]
                box = f"{min(x, corner[0])}, {min(y, corner[1])}, {max(x, corner[0])}, {max(y, corner[1])}"
                return [gr.skip(), f"{given[4].rstrip()}\n{box}".strip(), None]
            at, columns = int(objects.at([[x, y]])[0]), int(given[3])
            free = bool(given[4].strip() or given[5])
            return [str(at + 1) if free else f"{at // columns + 1}, {at % columns + 1}", gr.skip(), None]

    gr.on([control.change for control in about], show, about, scene, **_PRIVATE)
    scene.select(click, [clicks, corner, scene, *about], [inputs["target"], inputs["boxes"], corner], **_PRIVATE)


def _asked(
    host: Host, image: str | None, sample: str, rows: float, columns: float, boxes: str, file: str | None, target: str
) -> tuple[Any, Any, int]:
    """The picture, its objects, and which of them is searched for."""
    from .given import objects_of, target_of

    read = chosen(image, sample, _KIND, host.settings)
    objects = objects_of(read.size, int(rows or 0), int(columns or 0), boxes or "", file)
    return read, objects, target_of(objects, target or "", int(columns or 0))


def _people(
    file: str | None, image: str | None, read: Any, objects: Any, aim: int, columns: float, target: str
) -> dict[str, Any]:
    """Where people looked, if a file tells."""
    from .given import names_of, people_of

    if file is None:
        return {}
    names = [target.strip(), *names_of(objects, aim, int(columns))]
    return people_of(file, read.size, (image or "").strip() or None, list(dict.fromkeys(names)))
