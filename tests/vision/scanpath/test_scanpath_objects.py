"""Objects of a picture: fixations to objects, grids, files of boxes, proposals, and bad input."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vision.scanpath.objects import Objects, RegularGrid, propose, read_objects

SIZE = (100, 60)
BOXES = [[0, 0, 20, 20], [30, 0, 90, 50], [40, 10, 60, 30], [50, 20, 70, 40], [10, 40, 30, 60]]


@pytest.fixture
def objects() -> Objects:
    """Two apart; of the others the first holds the second and the third, which overlap and are of one size."""
    return Objects(np.array(BOXES), SIZE, labels=("a", "b", "c", "d", "a"))


# --- fixations to objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixation", "expected", "why"),
    [
        ((5, 19), 0, "inside one box"),
        ((90, 50), 1, "on its lower right corner, though the centres of others are nearer"),
        ((30, 0), 1, "on its upper left corner, though the centre of another is nearer"),
        ((35, 45), 1, "inside the large box only"),
        ((42, 12), 2, "inside the large box and a small one: the smaller"),
        ((52, 22), 2, "inside two of one size and the large one: the nearer centre, (50, 20)"),
        ((59, 29), 3, "the same, nearer to (60, 30)"),
        ((55, 25), 2, "the same, equally near: the first"),
        ((26, 10), 0, "in none: nearest centre (10, 10), though the edge of the large box is nearer"),
        ((95, 55), 3, "in none: nearest centre (60, 30)"),
        ((-50, -50), 0, "outside the picture: nearest centre"),
    ],
)
def test_a_fixation_falls_on_the_object_of_the_rule(objects: Objects, fixation: tuple, expected: int, why: str):
    assert objects.at([fixation]).tolist() == [expected], why


def test_fixations_are_assigned_as_one_by_one(objects: Objects):
    fixations = np.random.default_rng(0).uniform(-10, 110, size=(200, 2))

    def slow(x: float, y: float) -> int:
        holding = [n for n, (a, b, c, d) in enumerate(BOXES) if a <= x <= c and b <= y <= d]
        if holding:
            areas = {n: (BOXES[n][2] - BOXES[n][0]) * (BOXES[n][3] - BOXES[n][1]) for n in holding}
            holding = [n for n in holding if areas[n] == min(areas.values())]
        return min(holding or range(5), key=lambda n: math.dist((x, y), objects.centres[n]))

    found = objects.at(fixations)
    assert found.tolist() == [slow(*fixation) for fixation in fixations]
    assert found.dtype == np.int64 and set(found.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("none", [[], np.zeros((0, 2)), torch.zeros(0, 3)])
def test_no_fixations_fall_on_no_objects(objects: Objects, none: Any):
    assert objects.at(none).shape == (0,)


def test_durations_do_not_matter(objects: Objects):
    assert objects.at(torch.tensor([[5, 5, 0.3], [50, 20, 0.1]])).tolist() == [0, 2]


def test_one_object_takes_every_fixation():
    alone = Objects(np.array([[1, 1, 2, 2]]), SIZE)
    assert alone.at([[0, 0], [99, 59], [1.5, 1.5]]).tolist() == [0, 0, 0]


def test_five_hundred_objects():
    many = RegularGrid(20, 25).on((1000, 800))
    assert len(many) == 500
    assert many.at(many.centres).tolist() == list(range(500))


def test_a_box_is_cut_at_the_edge_of_the_picture():
    objects = Objects(np.array([[-10, -10, 20, 20], [90, 50, 130, 61]]), SIZE)
    assert objects.boxes.tolist() == [[0, 0, 20, 20], [90, 50, 100, 60]]
    assert objects.centres.tolist() == [[10, 10], [95, 55]]


def test_objects_do_not_change(objects: Objects):
    with pytest.raises(ValueError, match="read-only"):
        objects.boxes[0] = 0
    given = np.array([[1.0, 1, 2, 2]])
    kept = Objects(given, SIZE)
    given[:] = 7
    assert kept.boxes.tolist() == [[1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(3, 3), (np.int64(4), 4), ("b", 1), ((41, 11, 62, 33), 2), (np.array([0, 0, 100, 60]), 1), ([8, 41, 31, 70], 4)],
)
def test_a_target_is_an_index_a_label_or_the_best_overlap(objects: Objects, target: Any, expected: int):
    assert objects.index(target) == expected


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_fills_the_picture_row_by_row():
    grid = RegularGrid(2, 3).on((90, 40))
    assert grid.boxes[[0, 2, 3]].tolist() == [[0, 0, 30, 20], [60, 0, 90, 20], [0, 20, 30, 40]]
    assert grid.cells is not None and grid.cells.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert grid.at([[31, 19], [89, 21]]).tolist() == [1, 5]


def test_a_grid_is_found_from_some_of_its_boxes():
    known = RegularGrid(6, 14, (0.05, 0.09), (0.068, 0.165), (0.06, 0.15))
    some = [0, 5, 20, 33, 47, 71, 83]
    boxes, sizes = [], [(2559, 1600), (2550, 1590)]
    for n, item in enumerate(some):
        boxes.append(known.on(sizes[n % 2]).boxes[item])
    found = RegularGrid.fit(boxes, [sizes[n % 2] for n in range(len(some))], 6, 14)
    np.testing.assert_allclose(found.on(sizes[0]).boxes, known.on(sizes[0]).boxes, atol=1e-6)


def test_a_row_is_found_from_boxes_of_one_row():
    known = RegularGrid(1, 4, (0.1, 0.5), (0.25, 1.0), (0.2, 0.8))
    found = RegularGrid.fit(known.on((400, 100)).boxes[[0, 3]], (400, 100), 1, 4)
    np.testing.assert_allclose(found.on((400, 100)).boxes, known.on((400, 100)).boxes, atol=1e-9)


# --- files ------------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def as_records(**columns: list[Any]) -> list[dict[str, Any]]:
    sides = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)) for box in BOXES]
    return [side | {name: column[n] for name, column in columns.items()} for n, side in enumerate(sides)]


COCO = {
    "images": [
        {"id": 7, "file_name": "desk.jpg", "width": 100, "height": 60},
        {"id": 8, "file_name": "sink.jpg", "width": 50, "height": 40},
    ],
    "categories": [{"id": 1, "name": "cup"}, {"id": 5, "name": "fork"}],
    "annotations": [
        {"image_id": 7, "bbox": [10, 20, 30, 5], "category_id": 5},
        {"image_id": 8, "bbox": [0, 0, 10, 10], "category_id": 1},
        {"image_id": 7, "bbox": [0, 0, 100, 60], "category_id": 1, "iscrowd": 1},
        {"image_id": 7, "bbox": [50, 30, 20, 20], "category_id": 1},
    ],
}


def test_boxes_are_read_from_csv_and_json(tmp_path: Path):
    labels = ["cup", "fork", "cup", "lid", "jar"]
    for path in (
        write_csv(tmp_path / "a.csv", as_records(label=labels)),
        write_json(tmp_path / "a.json", as_records(label=labels)),
    ):
        objects = read_objects(path, SIZE)
        assert objects.boxes.tolist() == BOXES and objects.labels == tuple(labels) and objects.size == SIZE
    for path in (write_csv(tmp_path / "b.csv", as_records()), write_json(tmp_path / "b.json", BOXES)):
        objects = read_objects(path, SIZE)
        assert objects.boxes.tolist() == BOXES and objects.labels is None


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_boxes_of_one_of_several_pictures(tmp_path: Path, write: Callable[..., Path]):
    path = write(tmp_path / f"boxes.{write.__name__[-4:].strip('_')}", as_records(image=["x", "y", "x", "y", "y"]))
    assert read_objects(path, SIZE, image="x").boxes.tolist() == [BOXES[0], BOXES[2]]
    with pytest.raises(ValueError, match="boxes of 2 pictures; say which"):
        read_objects(path, SIZE)
    with pytest.raises(ValueError, match="no boxes of image='z'"):
        read_objects(path, SIZE, image="z")


@pytest.mark.parametrize("image", ["desk.jpg", 7])
def test_boxes_of_coco_with_size_and_labels(tmp_path: Path, image: str | int):
    objects = read_objects(write_json(tmp_path / "instances.json", COCO), image=image)
    assert objects.boxes.tolist() == [[10, 20, 40, 25], [50, 30, 70, 50]]
    assert objects.labels == ("fork", "cup") and objects.size == (100, 60)


# --- proposals --------------------------------------------------------------------------------------------------------


def desk() -> tuple[Image.Image, list[list[int]]]:
    """Three things of different colours and shapes on a plain ground."""
    picture = Image.new("RGB", (320, 200), (200, 196, 188))
    boxes = [[20, 30, 80, 100], [130, 20, 220, 70], [150, 110, 290, 180]]
    draw = ImageDraw.Draw(picture)
    draw.rectangle(boxes[0], fill=(180, 40, 40))
    draw.ellipse(boxes[1], fill=(40, 90, 180))
    draw.polygon([(150, 180), (220, 110), (290, 180)], fill=(60, 150, 70))
    return picture, boxes


def test_contours_find_things_on_a_plain_ground():
    picture, boxes = desk()
    found = propose(picture)
    assert len(found) == 3 and found.size == (320, 200)
    order = [1, 0, 2]  # from top to bottom by their centres
    np.testing.assert_allclose(found.boxes, np.array(boxes)[order], atol=5)
    np.testing.assert_array_equal(propose(np.asarray(picture)).boxes, found.boxes)


def test_the_largest_proposals_are_kept():
    picture, boxes = desk()
    np.testing.assert_allclose(propose(picture, limit=1).boxes, boxes[2:], atol=5)
    assert len(propose(picture, min_area=0.072)) == 2


def test_proposals_on_a_photograph_are_many_and_differ():
    photograph = Image.open(Path(__file__).parents[3] / "samples" / "coffee.jpg")
    found = propose(photograph, max_overlap=0.3)
    assert len(found) > 10 and found.size == photograph.size
    low = np.maximum(found.boxes[:, None, :2], found.boxes[:, :2])
    both = np.clip(np.minimum(found.boxes[:, None, 2:], found.boxes[:, 2:]) - low, 0, None).prod(-1)
    area = np.diag(both)
    assert (both / (area[:, None] + area - both) - np.eye(len(found))).max() <= 0.3


def test_selective_search_works_or_says_what_is_missing():
    picture, boxes = desk()
    if hasattr(cv2, "ximgproc"):
        found = propose(picture, "selective_search")
        assert any(np.abs(found.boxes - box).max(1).min() < 5 for box in np.array(boxes))
    else:
        with pytest.raises(ImportError, match="pip install opencv-contrib-python-headless"):
            propose(picture, "selective_search")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Objects(np.zeros((0, 4)), SIZE), "expected [N, 4] with N at least 1, got [0, 4]"),
        (lambda: Objects(np.zeros((2, 3)), SIZE), "got [2, 3]"),
        (lambda: Objects(np.array([*BOXES, [5, 5, 5, 9]]), SIZE), "object 5: box [5.0, 5.0, 5.0, 9.0] has no area"),
        (lambda: Objects(np.array([[9, 9, 5, 5]]), SIZE), "it is left, upper, right, lower"),
        (lambda: Objects(np.array([[100, 0, 120, 20]]), SIZE), "object 0: box [100.0, 0.0, 120.0, 20.0] lies outside"),
        (lambda: Objects(np.array([[0, 0, math.nan, 2]]), SIZE), "object 0: box [0.0, 0.0, nan, 2.0] is not finite"),
        (lambda: Objects(np.array(BOXES), (0, 60)), "size=(0, 60)"),
        (lambda: Objects(np.array(BOXES), SIZE, labels=("a",)), "1 labels for 5 boxes"),
        (lambda: Objects(np.array(BOXES), SIZE, cells=np.zeros((4, 2))), "cells [4, 2]: expected [5, 2]"),
        (lambda: Objects(np.array(BOXES), SIZE).at([[1, 2], [3, math.nan]]), "fixations: number 1 is [3.0, nan]"),
        (lambda: Objects(np.array(BOXES), SIZE).at([1, 2]), "fixations: expected places [T, 2]"),
        (lambda: Objects(np.array(BOXES), SIZE).index(5), "target=5 is not among the objects, which are 0 to 4"),
        (lambda: Objects(np.array(BOXES), SIZE).index(-1), "target=-1 is not among the objects"),
        (lambda: Objects(np.array(BOXES), SIZE).index("cup"), "which are nothing: the objects have no labels"),
        (lambda: Objects(np.array(BOXES), SIZE, labels=tuple("abcda")).index("x"), "objects, which are a, b, c, d"),
        (lambda: Objects(np.array(BOXES), SIZE, labels=tuple("abcda")).index("a"), "objects [0, 4] have that label"),
        (lambda: Objects(np.array(BOXES), SIZE).index((92, 52, 99, 59)), "overlaps with none of the 5 objects"),
        (lambda: Objects(np.array(BOXES), SIZE).index((5, 5, 5, 5)), "target: box [5.0, 5.0, 5.0, 5.0] has no area"),
        (lambda: Objects(np.array(BOXES), SIZE).index((5, 5)), "target=(5, 5): expected an index, a label, or"),
        (lambda: RegularGrid(0, 3), "a grid of 0 x 3: rows and columns count from 1"),
        (lambda: RegularGrid(1, 3, pitch=(0, 1)), "pitch=(0, 1): expected positive shares"),
        (lambda: RegularGrid(3, 3, pitch=(0.9, 0.9)).on(SIZE), "lies outside the picture"),
        (lambda: RegularGrid.fit([[0, 0, 10, 10]], SIZE, 2, 2), "1 boxes do not tell where 2 rows and 2 columns are"),
        (lambda: RegularGrid.fit(np.zeros((0, 4)), SIZE, 1, 1), "0 boxes do not tell"),
        (lambda: propose(desk()[0], "saliency"), "method='saliency': expected one of 'contours', 'selective_search'"),
        (lambda: propose(desk()[0], limit=0), "limit=0 must be at least 1"),
        (lambda: propose(np.zeros((5, 5))), "picture [5, 5], float64: expected RGB"),
        (lambda: propose(Image.new("RGB", (60, 40))), "contours found no objects in a picture of 60 x 40"),
    ],
)
def test_bad_input_is_named(call: Any, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "expected a name that ends in .csv or .json"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"boxes": []}', "expected a list of boxes, or COCO's images and annotations"),
        ("a.json", "[]", "has no boxes"),
        ("a.csv", "xmin,ymin,xmax,ymax\n", "has no boxes"),
        (
            "a.csv",
            "xmin,ymin,xmax,ymax\n1,2,3,4\n1,2,x,4\n",
            "a.csv, box 1: expected xmin, ymin, xmax, ymax",
        ),
        ("a.csv", "x,y,w,h\n1,2,3,4\n", "a.csv, box 0: expected xmin"),
        ("a.json", "[[1, 2, 3]]", "a.json, box 0: expected xmin"),
        ("a.json", "[[1, 2, 3, 4], [5, 6, 5, 9]]", "object 1: box [5.0, 6.0, 5.0, 9.0] has no area"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, says: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(says)):
        read_objects(tmp_path / name, SIZE)


def test_a_file_without_size_or_image_says_what_to_give(tmp_path: Path):
    with pytest.raises(ValueError, match="give size="):
        read_objects(write_json(tmp_path / "a.json", BOXES))
    coco = write_json(tmp_path / "coco.json", COCO)
    with pytest.raises(ValueError, match="image=None fits 2 of its images"):
        read_objects(coco)
    with pytest.raises(ValueError, match=r"image='oven.jpg' fits 0"):
        read_objects(coco, image="oven.jpg")
    with pytest.raises(FileNotFoundError):
        read_objects(tmp_path / "none.json", SIZE)
