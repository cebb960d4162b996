"""The page Look: the searches of the verb, over grids and boxes, beside people's, and what cannot be searched."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from apps.demos.given import names_of, objects_of, people_of, target_of
from apps.demos.host import Host
from apps.demos.looking import drawn, likeness, search, step
from apps.demos.uploads import samples
from apps.errors import UsageError
from apps.scanpath.command import Search
from vision.scanpath.datasets import read_csv

SHELF = samples("shelves")["shelf 3 by 9"]
GIVEN: dict[str, Any] = {
    "image": None, "sample": "shelf 3 by 9", "rows": 3, "columns": 9, "target": "2, 5", "boxes": "", "boxes_file": None,
    "humans": None, "humans_image": "", "num_scanpaths": 6, "temperature": 1, "max_refixations": -1, "seed": 0,
    "api_name": "/look",
}  # fmt: skip


def silent(*args: Any, **options: Any) -> None:
    assert args or options


def looked(objects: Any, target: int, samples: int = 6, seed: int = 0) -> Any:
    with Image.open(SHELF) as picture:
        how = Search((1, 1), (0, 0), samples=samples, seed=seed)
        return search(Host(), picture.convert("RGB"), objects, target, how, silent)  # pyright: ignore


@pytest.fixture(scope="module")
def grid() -> Any:
    return objects_of((216, 108), 3, 9, "", None)


@pytest.fixture(scope="module")
def found(grid: Any) -> Any:
    return looked(grid, target_of(grid, "2, 5", 9))


def test_searches_are_those_of_the_verb(run, tmp_path, found):
    done = run("scanpath", SHELF, "--grid", "3x9", "--target", "2,5", "--samples", 6, "-o", "out")
    assert done.code == 0, done.err
    (table,) = (tmp_path / "out").glob("*.csv")
    paths = [found.objects.at(one.fixations) for one in read_csv(table).scanpaths]
    assert len(paths) == 6
    for ours, theirs in zip(found.paths, paths, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    row = json.loads((tmp_path / "out" / "rows.jsonl").read_text("utf-8"))
    assert (row["found"], row["steps"]) == pytest.approx((found.found, found.steps), abs=1e-5)


def test_targets_by_place_number_and_name(grid):
    assert target_of(grid, "1,1", 9) == 0 and target_of(grid, "3 x 9", 9) == 26 and target_of(grid, "14", 9) == 13
    boxes = objects_of((216, 108), 3, 9, "0, 0, 40, 40, lamp\n100, 50, 140, 90", None)
    assert target_of(boxes, "lamp", 9) == 0 and target_of(boxes, "2", 9) == 1
    for objects, wrong in ((grid, "4, 1"), (grid, "28"), (grid, ""), (grid, "lamp"), (boxes, "3"), (boxes, "chair")):
        with pytest.raises(UsageError, match="target"):
            target_of(objects, wrong, 9)


def test_boxes_lie_where_the_grid_would_have_them(grid):
    lines = "\n".join(", ".join(map(str, box)) for box in grid.boxes.tolist())
    boxes = objects_of((216, 108), 3, 9, lines, None)
    assert boxes.cells is not None
    np.testing.assert_allclose(boxes.cells, grid.cells, atol=1e-9)
    for ours, theirs in zip(looked(boxes, 13).paths, looked(grid, 13).paths, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    free = looked(objects_of((216, 108), 3, 9, "0,0,40,40\n100,50,140,90\n60,10,90,40", None), 1)
    assert {int(at) for path in free.paths for at in path} <= {0, 1, 2}


def test_boxes_of_a_file(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps([[0, 0, 40, 40], [100, 50, 140, 90]]))
    (tmp_path / "b.csv").write_text("xmin,ymin,xmax,ymax,label\n0,0,40,40,lamp\n100,50,140,90,cup\n")
    for name in ("b.json", "b.csv"):
        objects = objects_of((216, 108), 3, 9, "", str(tmp_path / name))
        assert len(objects) == 2
        with pytest.raises(UsageError, match="target"):  # no row and column where there is no grid
            target_of(objects, "1, 2", 9)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError) as caught:
        objects_of((216, 108), 3, 9, "", str(tmp_path / "bad.json"))
    assert "bad.json" in str(caught.value) and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ("0, 0, 40", "line 1"),
        ("0,0,9,9\nx, 0, 1, 1", "line 2"),
        ("0, 0, 0, 9", "object 0"),
        ("900, 0, 999, 9", "object 0"),
        ("\n".join(["0,0,9,9"] * 500), "too many"),
    ],
)
def test_boxes_that_are_none(boxes, words):
    with pytest.raises(UsageError, match=words):
        objects_of((216, 108), 3, 9, boxes, None)


def test_a_grid_beyond_the_model_is_refused():
    objects = objects_of((216, 108), 30, 9, "", None)
    with pytest.raises(UsageError, match="grids of up to"):
        looked(objects, 0)


def test_people_beside_the_model(found, tmp_path):
    lines = ["scanpath_id,image,target,t,x,y"]
    for number, path in enumerate(found.fixations()[:2]):
        lines += [f"p{number},shelf,x,{t},{x},{y}" for t, (x, y) in enumerate(path.tolist())]
    file = tmp_path / "people.csv"
    file.write_text("\n".join(lines))
    people = people_of(str(file), found.objects.size, None, ())
    same = {
        row["metric"]: row["model"]
        for row in likeness(type(found)(found.objects, found.target, found.paths[:1]), {"p0": people["p0"]})
    }
    assert same["Sequence score"] == same["ScanMatch"] == 1 and same["Edit distance"] == 0
    rows = likeness(found, people)
    assert [row["metric"] for row in rows][:3] == ["Sequence score", "Edit distance", "ScanMatch"]
    assert all(row["model"] is not None and row["means"] for row in rows) and rows[0]["people"] < 1


HEADER = "scanpath_id,image,target,t,x,y\n"


def test_people_of_the_picture_and_target_are_chosen(tmp_path, grid):
    file, names = tmp_path / "people.csv", names_of(grid, 13, 9)
    file.write_text(HEADER + "a,one,x,0,1,1\nb,two,x,0,1,1\nc,two,14,0,2,2")
    assert [*people_of(str(file), grid.size, "one", names)] == ["a"]
    assert [*people_of(str(file), grid.size, "two", names)] == ["c"]
    file.write_text(HEADER + 'a,one,x,0,1,1\nb,one,"row 2, column 5",0,3,3')
    assert [*people_of(str(file), grid.size, None, names)] == ["b"]
    boxes = objects_of((216, 108), 3, 9, "0, 0, 40, 40, lamp\n100, 50, 140, 90", None)
    assert names_of(boxes, 0, 9) == ["lamp", "1"] and names_of(boxes, 1, 9) == ["2", "2"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,one,x,0,1,1\nb,two,x,0,1,1", "those of one, two"),
        ("a,one,x,0,1,1\nb,one,y,0,1,1", "searches for x, y, and none of these is called 'row 2, column 5'"),
        ("a,one,x,zero,1,1", "people.csv, line 2"),
        ("a,one,x,0,900,5\na,one,x,1,9,9\na,one,x,2,9,9", "another picture: a fixation lies at 900, 5"),
        ("a,one,x,0,-5,5\na,one,x,1,-6,9\na,one,x,2,9,9", "33% of all lie in this picture"),
        ("a,one,x,0,1e300,5", "another picture"),
        ("".join(f"a,one,x,{n},9,9\n" for n in range(61)), "1 recorded scanpaths of up to 61 fixations are too many"),
        ("".join(f"{n},one,x,0,9,9\n" for n in range(101)), "101 recorded scanpaths"),
        ("a,one,x,0,1,1\n" * 200_000, "more than 2 MB"),
    ],
)
def test_people_that_cannot_be_compared_with(tmp_path, grid, rows, words):
    file = tmp_path / "people.csv"
    file.write_text(HEADER + rows)
    with pytest.raises(UsageError, match=words) as caught:
        people_of(str(file), grid.size, None, names_of(grid, 13, 9))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "5",
        '{"images": 1, "annotations": 2}',
        '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
        "[[1e400, 0, 1, 1]]",
        "[[1" + "0" * 400 + ", 0, 1, 1]]",
        '[{"image": [1], "xmin": 0}]',
        '["abcd"]',
    ],
)
def test_files_that_hold_no_boxes(tmp_path, content):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(UsageError, match="the objects cannot be read"):
        objects_of((216, 108), 3, 9, "", str(tmp_path / "boxes.json"))


def test_pictures_and_files(found):
    with Image.open(SHELF) as shelf:
        picture = shelf.convert("RGB")
    made = drawn(picture, found, {})
    assert made["scanpaths"].shape == made["density"].shape == (320, 640, 3)
    with Image.open(made["film"]) as film:
        assert film.format == "GIF" and getattr(film, "n_frames", 1) >= max(map(len, found.paths))
    assert Path(made["film"]).stat().st_size < 2_000_000
    beside = drawn(picture, found, {"somebody": found.fixations()[1]})
    assert beside["scanpaths"].shape[1] == 2 * 640 + 8
    with Image.open(beside["film"]) as film:
        assert film.width == 2 * 480 + 8
    assert len(read_csv(made["table"]).scanpaths) == 6
    first, second = step(picture, found, 1, 1), step(picture, found, 1, 2)
    assert np.abs(first.astype(int) - second).max() > 0


@pytest.fixture
def client(connect: Any) -> Any:
    return connect("look")


def test_over_the_wire(client, tmp_path, found):
    film, scanpaths, density, metrics, film_file, table, metrics_file, facts = client.predict(**GIVEN)
    assert facts["objects"] == 27 and facts["target"] == 14 and facts["people"] == 0 and len(facts["scanpaths"]) == 6
    assert facts["scanpaths"] == [[int(at) + 1 for at in path] for path in found.paths]
    for name in (film, scanpaths, density, film_file):
        with Image.open(name) as picture:
            assert picture.width > 100
    assert metrics["data"] == [] and metrics_file is None
    *_, metrics_file, facts = client.predict(**{**GIVEN, "humans": handle_file(table), "seed": 1})
    assert facts["people"] == 6 and 0 < facts["metrics"]["ScanMatch"]["model"] < 1
    rows = list(csv.DictReader(Path(metrics_file).read_text("utf-8").splitlines()))
    assert float(rows[0]["people"]) == facts["metrics"]["Sequence score"]["people"]


def test_mistakes_are_said_in_words(client, broken, tmp_path):
    for path, words in broken:
        with pytest.raises(AppError, match=f"(?i){words}"):
            client.predict(**{**GIVEN, "sample": "", "image": handle_file(path)})
    (tmp_path / "words.csv").write_text("no,table\n1,2\n")
    for change, words in (
        ({"sample": ""}, "no picture yet"),
        ({"target": "9, 9"}, "the grid has rows 1 to 3"),
        ({"rows": 40, "target": "1"}, "grids of up to"),
        ({"boxes": "a, b"}, "line 1 of the boxes"),
        ({"humans": handle_file(tmp_path / "words.csv")}, "no column"),
        ({"num_scanpaths": 1000}, "greater than maximum"),
        ({"seed": None}, "a number is missing"),
    ):
        with pytest.raises(AppError, match=f"(?i){words}"):
            client.predict(**{**GIVEN, **change})
    assert client.predict(**GIVEN)[-1]["steps"] > 1


def test_a_wrong_model_of_the_owners_ends_the_command(run):
    done = run("demo", "look", "--model", "nowhere")
    assert done.code == 2 and "config.json is not there" in done.err
