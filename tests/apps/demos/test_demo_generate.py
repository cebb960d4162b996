"""The page Generate: the pictures of the pipeline, maps and losses of each step, and a stop that stops."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from support import wait_for

from apps.demos import generating
from apps.demos.generating import LOSSES, Drawn, Step, drawn_by, maps_at, nouns, order, regions, words
from apps.demos.host import Host
from apps.errors import UsageError
from apps.generate import models

PROMPT = "a red circle and a blue square"
GIVEN: dict[str, Any] = {
    "prompt": PROMPT, "subjects": "circle, square", "methods": ["plain", "A-STAR"], "seed": 0, "steps": 3,
    "guidance_scale": 3, "layout": "", "painted": None, "api_name": "/generate",
}  # fmt: skip


def ordered(host: Host, **given: Any) -> Any:
    known = {"prompt": PROMPT, "subjects": "circle, square", "seed": 0, "steps": 3, "guidance_scale": 3.0}
    return order(host, **{**known, "methods": ["plain", "A-STAR"], "layout": {}, **given})


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


def test_words_and_things():
    assert words("A red fire-truck and the dog's bone, a red one") == ["red", "fire-truck", "dog's", "bone", "one"]
    assert nouns(PROMPT) == ["circle", "square"]


def test_pictures_are_those_of_the_pipeline(host):
    steps, pictures = [], {}
    for what in drawn_by(host, ordered(host, methods=["plain", "A-STAR", "Attend-and-Excite"])):
        if isinstance(what, Step):
            steps.append((what.method, what.done))
        elif isinstance(what, Drawn):
            pictures[what.method] = what
    assert steps == [(method, done) for method in LOSSES for done in (1, 2, 3)]
    pipe = models.load(models.find(models.SHIPPED), torch.device("cpu"), "float32")
    for method, losses in LOSSES.items():
        guided: dict[str, Any] = (
            {"subjects": ["circle", "square"], "losses": losses, "step_size": 5.0} if losses else {}
        )
        expected = pipe(
            PROMPT, num_inference_steps=3, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), **guided
        ).images[0]
        assert pictures[method].image.tobytes() == expected.tobytes()
        assert pictures[method].maps.shape == (3, 16, 16, 2)
        assert {*pictures[method].losses} == {"segregation", "retention", "attend_and_excite"}
    assert len({one.image.tobytes() for one in pictures.values()}) == 3
    assert len(host.pool.names) == 1


def test_maps_of_a_step(host):
    drawn = [what for what in drawn_by(host, ordered(host, methods=["A-STAR"])) if isinstance(what, Drawn)]
    shown = maps_at(drawn, 2)
    assert [name for _, name in shown] == ["A-STAR: circle, step 2", "A-STAR: square, step 2"]
    assert all(picture.shape == (256, 256, 3) and picture.dtype == np.uint8 for picture, _ in shown)
    assert maps_at(drawn, 99)[0][1] == "A-STAR: circle, step 3"
    assert np.abs(shown[0][0].astype(int) - maps_at(drawn, 1)[0][0]).max() > 0


def test_a_region_moves_its_subject(host):
    places = regions(None, ["circle", "square"], ["#ff0000"], '{"circle": [0, 0, 0.5, 1], "square": [0.5, 0, 1, 1]}')
    free, placed = (
        next(w for w in drawn_by(host, ordered(host, methods=["A-STAR"], layout=layout)) if isinstance(w, Drawn))
        for layout in ({}, places)
    )
    assert free.image.tobytes() != placed.image.tobytes()


def painted(*boxes: tuple[str, tuple[int, int, int, int]]) -> dict[str, Any]:
    layer = np.zeros((64, 64, 4), np.uint8)
    for colour, (left, top, right, bottom) in boxes:
        layer[top:bottom, left:right] = [*(int(colour[at : at + 2], 16) for at in (1, 3, 5)), 255]
    return {"background": None, "layers": [layer], "composite": None}


def test_painted_regions_become_masks():
    colours = ["#e69f00", "#56b4e9"]
    given = painted(("#e69f00", (0, 0, 32, 64)), ("#56b4e9", (40, 0, 64, 32)))
    places = regions(given, ["circle", "square"], colours, "")
    masks = {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(place)))) > 127 for name, place in places.items()}
    assert masks["circle"][:, :32].all() and not masks["circle"][:, 32:].any()
    assert masks["square"].sum() == 24 * 32 and masks["square"][0, 40]
    with pytest.raises(UsageError, match="colour 2, but there are only 1"):
        regions(given, ["circle"], colours, "")
    assert regions(painted(), ["circle"], colours, "") == {}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 301}, "301 letters"),
        ({"subjects": ""}, "name two or more"),
        ({"subjects": "circle"}, "name two or more"),
        ({"methods": []}, "no method is chosen"),
        ({"methods": ["magic"]}, "no method 'magic'"),
        ({"steps": 0}, "1 to 100 steps"),
        ({"steps": 10**6}, "1 to 100 steps"),
        ({"seed": 0.5}, "expected whole numbers"),
        ({"guidance_scale": float("nan")}, "--guidance-scale"),
    ],
)
def test_orders_that_cannot_be(host, change, wanted):
    with pytest.raises(UsageError, match=wanted):
        ordered(host, **change)


@pytest.mark.parametrize("text", ["{", "[1]", '{"circle": "mask"}'])
def test_regions_that_cannot_be_read(text):
    with pytest.raises(UsageError, match="the regions"):
        regions(None, ["circle"], [], text)


def test_who_stops_listening_stops_the_work(host, monkeypatch):
    done: list[int] = []
    before = generating._drawn

    def counted(pipe: Any, settings: Any, method: str, at_step_end: Any) -> Any:
        def step() -> None:
            at_step_end()
            done.append(1)

        return before(pipe, settings, method, step)

    monkeypatch.setattr(generating, "_drawn", counted)
    with contextlib.closing(cast(Any, drawn_by(host, ordered(host, steps=100, methods=["A-STAR"])))) as listening:
        assert any(isinstance(what, Step) and what.done == 3 for what in listening)
    count = len(done)
    assert count < 10 and not [thread for thread in threading.enumerate() if thread.name.startswith("drawing")]
    time.sleep(0.3)
    assert len(done) == count
    monkeypatch.undo()
    assert any(isinstance(what, Drawn) for what in drawn_by(host, ordered(host))), "and the pool has its model back"


@pytest.fixture
def client(serve: Any) -> Any:
    with contextlib.closing(Client(serve("generate"), verbose=False)) as one:
        yield one


def test_over_the_wire(client):
    status, pictures, curves, table, sheet, facts = client.predict(**GIVEN)
    assert status == "Done." and [one["caption"] for one in pictures] == ["plain", "A-STAR"] and len(curves) == 2
    assert facts["subjects"] == ["circle", "square"] and facts["model"] == "text_to_scene"
    assert len(facts["losses"]["A-STAR"]["segregation"]) == 3
    rows = list(csv.DictReader(Path(table).read_text("utf-8").splitlines()))
    assert [(row["method"], row["step"]) for row in rows] == [
        (m, str(n)) for m in ("plain", "A-STAR") for n in (1, 2, 3)
    ]
    with Image.open(sheet) as both:
        assert both.size == (512, 256)


def test_mistakes_are_said_in_words(client):
    for change, wanted in (
        ({"prompt": ""}, "prompt is empty"),
        ({"subjects": "circle, elephant"}, "elephant"),
        ({"subjects": "circle, circle"}, "circle"),
        ({"layout": '{"elephant": [0, 0, 1, 1]}'}, "elephant"),
        ({"layout": '{"circle": [0.5, 0, 0.5, 1]}'}, "circle"),
        ({"steps": 1000}, "greater than maximum"),
        ({"prompt": "a " * 100, "subjects": "", "methods": ["plain"]}, "tokens, of which the model reads"),
    ):
        with pytest.raises(AppError, match=f"(?i){wanted}"):
            client.predict(**{**GIVEN, **change})
    status, *_ = client.predict(**{**GIVEN, "prompt": f"{PROMPT} <b>elephant</b>"})
    assert "does not know" in status and "elephant" in status


def test_a_cancelled_request_ends_within_a_step(client, serve, monkeypatch):
    done: list[float] = []
    before = generating.called

    def counted(pipe: Any, own: Any, watched: Any, step: Any) -> Any:
        def counting() -> None:
            step()
            done.append(time.monotonic())

        return before(pipe, own, watched, counting)

    with monkeypatch.context() as patch:
        patch.setattr(generating, "called", counted)
        job = client.submit(**{**GIVEN, "steps": 100, "methods": ["A-STAR"]})
        wait_for(lambda: len(done) > 2)
        job.cancel()
        wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("drawing")])
    assert len(done) < 100
    assert client.predict(**GIVEN)[0] == "Done."


def test_out_of_memory_is_said_and_over_with(client, monkeypatch):
    def greedy(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generating, "called", greedy)
        with pytest.raises(AppError, match="not enough memory on this server"):
            client.predict(**GIVEN)
    assert client.predict(**GIVEN)[0] == "Done."
