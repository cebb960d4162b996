"""The page Generate: the pictures of the verb, maps and losses of each step, regions, and a stop that stops."""

from __future__ import annotations

import contextlib
import csv
import io
import threading
import time
import zipfile
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch
from gradio.components.image_editor import AcceptBlobs, EditorData
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from support import wait_for

import weights
from apps.demos import generating
from apps.demos.curves import curves
from apps.demos.generating import LOSSES, Drawn, Note, Step, drawn_by, maps_at, order, packed
from apps.demos.home import build
from apps.demos.host import Host, Settings
from apps.demos.painting import editor, regions
from apps.demos.subjects import among, joined, kept, legend, nouns, words
from apps.errors import UsageError
from apps.generate.run import Options
from apps.generate.run import generate as verb

PROMPT = "a red circle and a blue square"
TWO = ["circle", "square"]
GIVEN: dict[str, Any] = {
    "prompt": PROMPT, "subjects": TWO, "methods": ["plain", "A-STAR"], "seed": 1, "steps": 3, "guidance_scale": 3,
    "layout": "", "painted": None, "api_name": "/generate",
}  # fmt: skip


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


def ordered(host: Host, **given: Any) -> Any:
    known = {"prompt": PROMPT, "subjects": TWO, "seed": 1, "steps": 3, "guidance_scale": 3.0}
    return order(host, **{**known, "methods": ["plain", "A-STAR"], "layout": {}, **given})


def drawn(host: Host, **given: Any) -> list[Drawn]:
    return [what for what in drawn_by(host, ordered(host, **given)) if isinstance(what, Drawn)]


def drawing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "drawing"]


def test_words_follow_the_prompt():
    assert words("A red fire-truck and the dog's bone, a red one") == ["red", "fire-truck", "dog's", "bone", "one"]
    assert nouns(PROMPT) == TWO
    assert kept("a fire truck and a cat", ["dog", "Fire Truck", "at", "cat", ""]) == ["Fire Truck", "cat"]
    assert among("a fire truck and a cat", ["fire truck", "cat"]) == ["cat"]
    assert joined("a fire truck and a cat", ["cat", "truck", "dog"], ["fire truck", "cat"]) == [
        "truck", "cat", "fire truck"
    ]  # fmt: skip
    shown = legend(["<b>", "cat", "dog"], {"orange": "#e69f00", "blue": "#56b4e9"})
    assert "orange: <strong>&lt;b&gt;</strong>" in shown and "no colour is left for dog" in shown


def test_pictures_are_those_of_the_verb(host, tmp_path):
    told = [*drawn_by(host, ordered(host, methods=["plain", "A-STAR", "Attend-and-Excite"]))]
    steps = [(what.method, what.done) for what in told if isinstance(what, Step)]
    assert steps == [(method, done) for method in LOSSES for done in (1, 2, 3)]
    pictures = {what.method: what for what in told if isinstance(what, Drawn)}
    given = {"prompt": PROMPT, "subjects": tuple(TWO), "seed": 1, "steps": 3, "guidance_scale": 3.0}
    assert verb(Options(str(tmp_path / "a"), given, compare=True, device="cpu")) == 0
    given = {**given, "losses": {"attend_and_excite": 1.0}}
    assert verb(Options(str(tmp_path / "b"), given, device="cpu")) == 0
    name = "a-red-circle-and-a-blue-square-1"
    for method, path in (("plain", f"a/{name}-plain"), ("A-STAR", f"a/{name}"), ("Attend-and-Excite", f"b/{name}")):
        with Image.open(tmp_path / f"{path}.png") as expected:
            assert pictures[method].image.tobytes() == expected.tobytes()
    assert len({one.image.tobytes() for one in pictures.values()}) == 3
    assert all({*one.losses} == {"segregation", "retention", "attend_and_excite"} for one in pictures.values())
    assert len(host.pool.names) == 1


def test_maps_of_a_step_and_what_is_handed_out(host):
    one = drawn(host, methods=["A-STAR"])
    (method, maps), *more = maps_at(one, 2)[0]
    assert method == "A-STAR" and [name for name, _ in maps] == TWO and not more
    assert maps[0][1].size == (192, 192) and maps_at(one, 2)[1] == cast(Any, one[0].maps).max() > 0
    assert maps[0][1].tobytes() != maps_at(one, 1)[0][0][1][0][1].tobytes()
    assert maps_at(one, 99)[0][0][1][0][1].tobytes() == maps_at(one, 3)[0][0][1][0][1].tobytes()
    content = packed(one)
    assert content == packed(one)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["a_star.png", "a_star_maps.npz", "a_star_maps.png"]
        with Image.open(io.BytesIO(archive.read("a_star.png"))) as image:
            assert image.tobytes() == one[0].image.tobytes()
        with np.load(io.BytesIO(archive.read("a_star_maps.npz"))) as arrays:
            assert (arrays["maps"] == one[0].maps).all() and arrays["maps"].shape == (3, 16, 16, 2)
            assert [*arrays["subjects"]] == TWO and arrays["segregation"].shape == (3,)


def test_without_subjects_there_is_a_plain_picture_and_no_map(host):
    (one,) = drawn(host, methods=["plain"], subjects=[])
    assert one.maps is None and maps_at([one], 1) == ([], 0.0) and one.image.size == (32, 32)
    assert one.image.tobytes() == drawn(host, methods=["plain"])[0].image.tobytes()


def test_curves_are_told_by_more_than_colour_and_break_where_there_is_no_value():
    own = {"segregation": [0.3, float("nan"), 0.2, 0.1], "retention": [0.0, 1.2, 1.1, 1.0]}
    shown = curves({"plain": own, "A-STAR": own, "none": {}})
    assert shown.count("<figure") == 2 and shown.count("<li ") == 2
    panel = shown.split("<figure")[1]
    assert panel.count("<polyline") == 2 and panel.count('stroke-dasharray="6 4"') == 1
    assert "<circle" in panel and "<polygon" in panel
    assert shown.split("<figure")[2].count("step 1:") == 0
    assert curves({"plain": {}}) == ""


def painted(*boxes: tuple[str, tuple[int, int, int, int]], side: int = 256) -> list[bytes]:
    layer = np.zeros((side, side, 4), np.uint8)
    for colour, (left, top, right, bottom) in boxes:
        layer[top:bottom, left:right] = [*bytes.fromhex(colour.removeprefix("#")), 255]
    content = io.BytesIO()
    Image.fromarray(layer).save(content, "PNG")
    return [content.getvalue()]


ORANGE, BLUE = "#e69f00", "#56b4e9"


def test_a_painted_region_draws_its_subject_there(host):
    sheet = painted((ORANGE, (128, 0, 256, 256)), (BLUE, (0, 0, 128, 256)))
    right = []
    for layout in ({}, regions(sheet, TWO)):
        (one,) = drawn(host, methods=["A-STAR"], layout=layout, steps=10, seed=0)
        pixels = np.asarray(one.image).astype(int)
        red = (pixels[..., 0] - pixels[..., 2]).clip(0)
        right.append(red[:, 16:].sum() / red.sum())
    assert right[0] < 0.3 and right[1] > 0.7, "the red circle moves to the half that was painted for it"
    told = [*drawn_by(host, ordered(host, methods=["plain"], layout=regions(sheet, TWO), steps=1))]
    assert Note("Regions guide A-STAR only, which was not drawn.") in told


def test_regions_that_are_read():
    places = regions(painted((ORANGE, (0, 0, 128, 256)), (BLUE, (160, 0, 256, 128))), TWO, '{"circle": [0, 0, 1, 1]}')
    masks = {name: np.asarray(generating.place_of(place)) > 127 for name, place in places.items()}
    assert masks["circle"][:, :128].all() and not masks["circle"][:, 128:].any(), "painted before written"
    assert masks["square"].sum() == 96 * 128 and masks["square"][0, 160]
    assert regions(None, TWO, '{"square": [0.5, 0, 1, 1]}') == {"square": (0.5, 0, 1, 1)}
    assert regions(painted(), TWO) == regions([], TWO) == {}


def test_regions_that_cannot_be(tmp_path):
    sheet = painted((ORANGE, (0, 0, 128, 256)), (BLUE, (160, 0, 256, 128)))
    for layers, subjects, wanted in (
        (sheet, ["circle"], "painted in blue, the colour of subject 2: there are only 1"),
        (sheet, [], "painted in orange, the colour of subject 1: there is no subject"),
        (painted(side=2000), TWO, "2000 × 2000 pixels"),
        ([*sheet, *painted(side=128)], TWO, "differ in size"),
        ([b"<svg/>"], TWO, "no picture that can be read"),
        ([str(tmp_path / "gone.png")], TWO, "no picture that can be read"),
        (sheet * 5, TWO, "5 layers"),
    ):
        with pytest.raises(UsageError, match=wanted):
            regions(layers, subjects)
    huge = "1" + "0" * 400
    boxes = ('"mask"', "[0.5, 0, 0.5, 1]", "[0, 0, NaN, 1]", f"[0, 0, {huge}, 1]", "[0, 0, true, 1]", "[0, 0, 1]")
    for text in ("{", "[1]", "[" * 2000, '{"elephant": [0, 0, 1, 1]}', *(f'{{"circle": {box}}}' for box in boxes)):
        with pytest.raises(UsageError, match="region"):
            regions(None, TWO, text)


def test_what_browsers_send_ahead_is_bounded():
    sheet = cast(Any, editor("Regions"))

    def send(name: str, index: Any, content: bytes = b"x", kind: str = "layer") -> None:
        data = {"type": kind, "index": index, "id": name, "file": b""}
        sheet.accept_blobs(AcceptBlobs.model_construct(data=data, files=[("file", content)]))

    send("one", "1", b"second")
    send("one", "0", b"first")
    send("one", "null", b"background", "background")
    for index in (10**9, -1, "1" * 5000, None):
        send("one", index)
    send("one", "2", b"x" * 600_000)
    assert sheet.preprocess(EditorData(id="one")) == [b"first", b"second"]
    send("old", "0")
    for number in range(40):
        send(f"new {number}", "0")
    assert sheet.preprocess(EditorData(id="new 39")) == [b"x"]
    with pytest.raises(Exception, match="did not arrive"):
        sheet.preprocess(EditorData(id="old"))
    assert [*sheet.preprocess(None)] == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "x" * 301}, "301 letters"),
        ({"subjects": []}, "choose two or more"),
        ({"subjects": ["circle"]}, "choose two or more"),
        ({"subjects": [], "methods": ["Attend-and-Excite"]}, "choose one or more"),
        ({"subjects": [1, 2]}, "expected words"),
        ({"subjects": ["circle"] * 9}, "9 subjects are too many"),
        ({"methods": []}, "no method is chosen"),
        ({"methods": ["magic"]}, "no method 'magic'"),
        ({"steps": 0}, "steps: expected a whole number from 1 to 100, not 0"),
        ({"steps": 10**6}, "from 1 to 100"),
        ({"steps": None}, "from 1 to 100"),
        ({"seed": 0.5}, "seed: expected a whole number"),
        ({"seed": float("inf")}, "seed: expected a whole number"),
        ({"guidance_scale": float("nan")}, "guidance scale: expected a number"),
        ({"guidance_scale": "3"}, "guidance scale: expected a number"),
    ],
)
def test_orders_that_cannot_be(host, change, wanted):
    with pytest.raises(UsageError, match=wanted):
        ordered(host, **change)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"subjects": ["circle", "elephant"]}, "'elephant' is not in the prompt"),
        ({"subjects": ["circle", "circle"]}, "named 2 times"),
        ({"subjects": ["red circle", "circle"]}, "stand for the same words"),
        ({"prompt": "circle square " * 20}, "tokens, of which the model reads"),
    ],
)
def test_what_only_the_model_knows_is_said_before_anything_is_drawn(host, change, wanted):
    told: list[Any] = []
    with pytest.raises(UsageError, match=wanted):
        told.extend(drawn_by(host, ordered(host, **change)))
    assert not told and not drawing()


def test_one_subject_is_enough_to_be_strengthened_and_unknown_words_are_noted(host):
    given = {"subjects": ["circle"], "methods": ["Attend-and-Excite"], "prompt": "a red circle and <b>", "steps": 1}
    told = [*drawn_by(host, ordered(host, **given))]
    assert any(isinstance(what, Note) and "does not know b; it knows" in what.text for what in told)
    assert isinstance(told[-1], Drawn) and told[-1].maps is not None and told[-1].maps.shape[-1] == 1


def test_the_model_of_the_owner_draws():
    folder = str(weights.shipped("text_to_scene"))
    other = Host(Settings(model=folder))
    wanted = ordered(other, methods=["plain"], steps=1)
    assert wanted.settings.model == folder and wanted.model.suits == {"guidance_scale": 7.5}
    blocks: list[Any] = [*build(other, "generate").blocks.values()]
    shown = {block.elem_id: block for block in blocks if getattr(block, "elem_id", None)}
    assert shown["generate-steps"].value == 50 and shown["generate-scale"].value == 7.5
    texts = [block.value for block in blocks if type(block).__name__ == "Markdown"]
    assert any("text_to_scene" in text and folder not in text for text in texts)


def test_who_stops_listening_stops_the_work(host, monkeypatch):
    done: list[int] = []
    before = generating.called

    def counted(pipe: Any, own: Any, watched: Any, step: Any) -> Any:
        def counting() -> None:
            step()
            done.append(1)

        return before(pipe, own, watched, counting)

    monkeypatch.setattr(generating, "called", counted)
    with contextlib.closing(cast(Any, drawn_by(host, ordered(host, steps=100, methods=["A-STAR"])))) as listening:
        assert any(isinstance(what, Step) and what.done == 3 for what in listening)
    wait_for(lambda: not drawing())
    count = len(done)
    assert count < 50
    time.sleep(0.3)
    assert len(done) == count
    monkeypatch.undo()
    assert len(drawn(host)) == 2, "and the pool has its model back"


@pytest.fixture
def address(serve: Any) -> str:
    return serve("generate")


@pytest.fixture
def client(address: str) -> Any:
    with contextlib.closing(Client(address, verbose=False)) as one:
        yield one


def test_over_the_wire(client):
    status, pictures, losses, table, archive, facts = client.predict(**GIVEN)
    assert status == "Done." and [one["caption"] for one in pictures] == ["plain", "A-STAR"]
    assert facts["subjects"] == TWO and facts["model"] == "text_to_scene" and "<polyline" in losses
    assert len(facts["losses"]["A-STAR"]["segregation"]) == 3
    rows = list(csv.DictReader(Path(table).read_text("utf-8").splitlines()))
    assert [(row["method"], row["step"]) for row in rows] == [
        (m, str(n)) for m in ("plain", "A-STAR") for n in (1, 2, 3)
    ]
    with zipfile.ZipFile(archive) as content, Image.open(pictures[1]["image"]) as shown:
        with Image.open(io.BytesIO(content.read("a_star.png"))) as image:
            assert shown.tobytes() == image.resize(shown.size, 0).tobytes() and shown.size == (256, 256)
    in_one = client.predict(**{**GIVEN, "subjects": "circle, square"})
    assert in_one[-1] == facts
    for change, wanted in (
        ({"prompt": ""}, "prompt is empty"),
        ({"subjects": ["circle", "<img src=x>"]}, "&lt;img src=x&gt;"),
        ({"subjects": ["circle", {"a": 1}]}, "expected words of the prompt"),
        ({"layout": '{"elephant": [0, 0, 1, 1]}'}, "elephant"),
        ({"steps": 1000}, "greater than maximum"),
    ):
        with pytest.raises(AppError, match=f"(?i){wanted}"):
            client.predict(**{**GIVEN, **change})


def test_a_cancelled_request_and_one_whose_client_has_gone_end_within_a_step(client, address, monkeypatch):
    done: list[int] = []
    before = generating.called

    def counted(pipe: Any, own: Any, watched: Any, step: Any) -> Any:
        def counting() -> None:
            step()
            done.append(1)

        return before(pipe, own, watched, counting)

    monkeypatch.setattr(generating, "called", counted)
    job = client.submit(**{**GIVEN, "steps": 100, "methods": ["A-STAR"]})
    wait_for(lambda: len(done) > 2)
    job.cancel()
    wait_for(lambda: not drawing())
    assert len(done) < 90
    done.clear()
    with httpx.Client(base_url=address, timeout=60) as browser:
        config = browser.get("config").json()
        number = next(one["id"] for one in config["dependencies"] if one["api_name"] == "generate")
        given = [PROMPT, TWO, ["A-STAR"], 1, 100, 3, "", None]
        body = {"data": given, "fn_index": number, "session_hash": "gone"}
        browser.post("gradio_api/queue/join", json=body).raise_for_status()
        with browser.stream("GET", "gradio_api/queue/data", params={"session_hash": "gone"}) as events:
            for line in events.iter_lines():
                if "process_generating" in line and len(done) > 2:
                    break
    wait_for(lambda: not drawing())
    assert len(done) < 90
    assert client.predict(**GIVEN)[0] == "Done."


def test_out_of_memory_is_said_and_over_with(client, monkeypatch):
    def greedy(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(generating, "called", greedy)
        with pytest.raises(AppError, match="not enough memory on this server"):
            client.predict(**GIVEN)
    assert client.predict(**GIVEN)[0] == "Done."
