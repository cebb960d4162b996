"""Recorded scanpaths: what the readers make of each layout, splits by picture, and bad input."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vision.scanpath.datasets import (
    Scanpath,
    ScanpathDataset,
    Scene,
    check_disjoint,
    draw_split,
    drop_outliers,
    read_coco_search,
    read_csv,
    read_sti,
    split_by_image,
)
from vision.scanpath.metrics import behaviour, fixation_edit_distance, multimatch, scanmatch, sequence_score
from vision.scanpath.objects import RegularGrid

STI = {
    "3.jpg": {
        "size": {"width": 2559, "height": 1600},
        "target": "target_0.jpg",
        "ground_truth": [{"xmin": 2184, "ymin": 22, "xmax": 2339, "ymax": 262}],
        "fixations": {"1": [[10, 20], [30, 40], [30, 41]], "4": [[5, 6]], "5": []},
    },
    "7.jpg": {
        "size": {"width": 2550, "height": 1590},
        "target": "target_1.jpg",
        "ground_truth": {"xmin": 0, "ymin": 5, "xmax": 10, "ymax": 25},
        "fixations": {},
    },
}
COCO = [
    {
        "name": "0001.jpg",
        "subject": 2,
        "task": "cup",
        "condition": "present",
        "bbox": [67, 114, 78, 42],
        "split": "train",
    }
    | {"X": [840.1, 12.5], "Y": [525.0, 33.0], "T": [150, 75.5], "length": 2, "correct": 1},
    {
        "name": "0001.jpg",
        "subject": 3,
        "task": "cup",
        "condition": "present",
        "bbox": [67, 114, 78, 42],
        "split": "train",
    }
    | {"X": [840.0], "Y": [525.0], "T": [99], "length": 1, "correct": 1},
    {"name": "0001.jpg", "subject": 2, "task": "fork", "condition": "absent", "split": "valid"}
    | {"X": [1.0, 2.0, 3.0], "Y": [4.0, 5.0, 6.0], "length": 3, "correct": 0},
]
CSV = """scanpath_id,image,target,t,x,y,person
b,desk.jpg,pen,0.5,3,4,anna
a,desk.jpg,cup,2,7.5,8,ben
b,desk.jpg,pen,0.1,1,2,anna
a,desk.jpg,cup,1,5,6,ben
c,sink.jpg,cup,0,9,9,anna
"""


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def made(images: dict[str, str], people: int = 3) -> ScanpathDataset:
    """Pictures with their targets, and a scanpath of each person on each."""
    scenes = [Scene(image, target) for image, target in images.items()]
    paths = [Scanpath(f"{s.image}/{p}", s, np.full((2, 2), p)) for s in scenes for p in range(people)]
    return ScanpathDataset(tuple(scenes), tuple(paths))


# --- readers ----------------------------------------------------------------------------------------------------------


def test_the_sti_layout(tmp_path: Path):
    data = read_sti(write(tmp_path / "sti.json", STI))
    first, second = data.scenes
    assert first == Scene("3.jpg", "target_0.jpg", (2559, 1600), (2184, 22, 2339, 262))
    assert second == Scene("7.jpg", "target_1.jpg", (2550, 1590), (0, 5, 10, 25))
    assert [(path.id, path.person, len(path)) for path in data.scanpaths] == [
        ("3.jpg/1", "1", 3),
        ("3.jpg/4", "4", 1),
        ("3.jpg/5", "5", 0),
    ]
    assert data.scanpaths[0].fixations.tolist() == [[10, 20], [30, 40], [30, 41]]
    assert data.scanpaths[0].durations is None and data.scanpaths[2].fixations.shape == (0, 2)
    assert {scene.image: len(paths) for scene, paths in data.by_scene().items()} == {"3.jpg": 3, "7.jpg": 0}


def test_the_layout_of_coco_search18(tmp_path: Path):
    path = write(tmp_path / "coco.json", COCO)
    data = read_coco_search(path)
    cup, fork = data.scenes
    assert cup == Scene("0001.jpg", "cup", (1680, 1050), (67, 114, 145, 156))
    assert fork == Scene("0001.jpg", "fork", (1680, 1050), None)
    assert [(path.id, path.person, len(path)) for path in data.scanpaths] == [
        ("0001.jpg/cup/2", "2", 2),
        ("0001.jpg/cup/3", "3", 1),
        ("0001.jpg/fork/2", "2", 3),
    ]
    assert data.scanpaths[0].fixations.tolist() == [[840.1, 525], [12.5, 33]]
    assert data.scanpaths[0].durations is not None
    np.testing.assert_allclose(data.scanpaths[0].durations, [0.15, 0.0755])
    assert data.scanpaths[2].durations is None
    assert data.images == ("0001.jpg",) and len(data.by_scene()[cup]) == 2


def test_parts_of_coco_search18_that_share_a_picture_are_refused(tmp_path: Path):
    path = write(tmp_path / "coco.json", COCO)
    train, valid = read_coco_search(path, "train"), read_coco_search(path, "valid")
    assert (len(train.scanpaths), len(valid.scanpaths)) == (2, 1)
    with pytest.raises(ValueError, match=r"1 pictures are in train and in valid: 0001.jpg\."):
        check_disjoint({"train": train, "valid": valid})


def test_a_table_is_read_in_any_order_of_rows(tmp_path: Path):
    for start in ("", "\ufeff"):
        data = read_csv(write(tmp_path / "table.csv", start + CSV))
        assert {path.id: path.fixations.tolist() for path in data.scanpaths} == {
            "b": [[1, 2], [3, 4]],
            "a": [[5, 6], [7.5, 8]],
            "c": [[9, 9]],
        }
        assert [path.id for path in data.scanpaths] == ["b", "a", "c"]
        assert data.scenes == (Scene("desk.jpg", "pen"), Scene("desk.jpg", "cup"), Scene("sink.jpg", "cup"))
        assert data.images == ("desk.jpg", "sink.jpg")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_a_split_by_image_takes_all_scanpaths_of_a_picture():
    data = made({"a": "x", "b": "x", "c": "y"})
    parts = split_by_image(data, {"train": ["c", "a"], "test": ["b"]})
    assert [path.id for path in parts["train"].scanpaths] == ["a/0", "a/1", "a/2", "c/0", "c/1", "c/2"]
    assert parts["train"].images == ("a", "c") and parts["test"].images == ("b",)


def test_a_split_with_overlap_is_refused():
    data = made({"a": "x", "b": "x", "c": "y"})
    with pytest.raises(ValueError, match=r"1 pictures are in train and in test: b\. .* split by picture"):
        split_by_image(data, {"train": ["a", "b"], "val": ["c"], "test": ["b"]})


def test_a_split_by_scanpath_is_refused():
    """What the released preparation does: a random part of the scanpaths, whatever their pictures."""
    data = made({name: "x" for name in "abcdefgh"})
    parts = {
        name: ScanpathDataset(tuple(dict.fromkeys(path.scene for path in paths)), tuple(paths))
        for name, paths in (("train", data.scanpaths[1:]), ("test", data.scanpaths[:1]))
    }
    with pytest.raises(ValueError, match="1 pictures are in train and in test: a"):
        check_disjoint(parts)
    check_disjoint({"train": parts["test"], "test": made({"z": "x"})})


def test_a_drawn_split_keeps_the_targets_in_proportion():
    data = made({f"{target}{n}": f"target {target}" for n in range(20) for target in "pqrst"})
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    split = draw_split(data, shares)
    assert {name: len(images) for name, images in split.items()} == {"train": 70, "val": 10, "test": 20}
    for name, share in shares.items():
        assert Counter(image[0] for image in split[name]) == dict.fromkeys("pqrst", round(20 * share))
    assert split == draw_split(data, shares) != draw_split(data, shares, seed=1)
    assert len(split_by_image(data, split)["test"].scanpaths) == 60


def test_a_drawn_split_of_targets_that_occur_once_keeps_the_shares():
    data = made({f"{n}.jpg": f"target {n}" for n in range(50)}, people=1)
    split = draw_split(data, {"train": 0.8, "test": 0.2})
    assert (len(split["train"]), len(split["test"])) == (40, 10)


def test_a_picture_with_several_targets_stays_whole():
    scenes = [Scene(f"{n % 10}.jpg", f"{n}") for n in range(30)]
    data = ScanpathDataset(tuple(scenes), tuple(Scanpath(s.target, s, np.zeros((1, 2))) for s in scenes))
    parts = split_by_image(data, draw_split(data, {"train": 0.5, "test": 0.5}))
    assert [len(part.scanpaths) for part in parts.values()] == [15, 15]


def lengths_of(data: ScanpathDataset) -> list[int]:
    return [len(path) for path in data.scanpaths]


def test_scanpaths_of_unusual_length_are_left_out_and_scenes_stay():
    scene = Scene("a.jpg", "cup")
    paths = tuple(
        Scanpath(str(n), scene, np.zeros((length, 2))) for n, length in enumerate([10] * 50 + [12] * 50 + [40])
    )
    data = ScanpathDataset((scene, Scene("b.jpg", "cup")), paths)
    kept = drop_outliers(data)
    assert lengths_of(kept) == [10] * 50 + [12] * 50 and kept.scenes == data.scenes
    assert lengths_of(drop_outliers(data, deviations=0.5)) == [10] * 50 + [12] * 50
    test = ScanpathDataset((scene,), tuple(Scanpath(str(n), scene, np.zeros((n, 2))) for n in (0, 8, 9, 13, 14)))
    assert lengths_of(drop_outliers(test, reference=kept)) == [8, 9, 13, 14]  # 11 and three times 1
    same = ScanpathDataset((scene,), paths[:3])
    assert drop_outliers(same).scanpaths == same.scanpaths  # no spread, no outliers
    assert drop_outliers(ScanpathDataset((scene,), ()), reference=data).scanpaths == ()


@pytest.mark.parametrize("deviations", [0, -1, math.nan])
def test_outliers_need_a_limit_and_something_to_compare_with(deviations: float):
    with pytest.raises(ValueError, match=f"deviations={deviations} must be positive"):
        drop_outliers(made({"a": "x"}), deviations)
    with pytest.raises(ValueError, match="no scanpaths to tell usual lengths from"):
        drop_outliers(ScanpathDataset((Scene("a", "x"),), ()))


# --- bad input --------------------------------------------------------------------------------------------------------


def changed(content: Any, *keys: Any, to: Any) -> Any:
    """A copy with one thing replaced."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return copy


@pytest.mark.parametrize(
    ("read", "content", "says"),
    [
        (read_sti, "{", "is not JSON"),
        (read_sti, [], "expected an object, name of a picture → its scanpaths, got a list"),
        (read_sti, changed(STI, "3.jpg", "size", to={}), "3.jpg: not of the STI layout (KeyError: 'width')"),
        (read_sti, changed(STI, "3.jpg", "ground_truth", to=[]), "3.jpg: not of the STI layout (IndexError"),
        (read_sti, changed(STI, "3.jpg", "fixations", "1", 1, to=[1, math.nan]), "person 1: number 1 is [1.0, nan]"),
        (read_sti, changed(STI, "3.jpg", "fixations", "4", to=[1, 2]), "person 4: expected places [T, 2]"),
        (read_coco_search, STI, "expected a list of searches, got an object"),
        (read_coco_search, [], "no searches."),
        (
            read_coco_search,
            changed(COCO, 1, "X", to=[1, 2]),
            "search 1: not of COCO-Search18's layout (ValueErr",
        ),
        (read_coco_search, [{"name": "a"}], "search 0: not of COCO-Search18's layout (KeyError: 'X')"),
        (read_coco_search, [1], "search 0: not of COCO-Search18's layout (TypeError"),
        (read_coco_search, changed(COCO, 2, "Y", 0, to=None), "search 2: number 0 is [1.0, nan]"),
        (read_coco_search, changed(COCO, 0, "T", 1, to=0), "search 0: duration 0.0 is not positive"),
        (lambda path: read_coco_search(path, "test"), COCO, "no searches of split 'test'"),
        (read_csv, "scanpath_id,image,t,x\n", "has no column target, y; expected scanpath_id, image, target, t, x, y"),
        (read_csv, "", "has no column scanpath_id"),
        (read_csv, CSV.splitlines()[0] + "\n", "has no rows"),
        (read_csv, CSV.replace("7.5", "left"), "line 3: t, x and y must be numbers"),
        (read_csv, CSV.replace("7.5", "nan"), "scanpath a: number 1 is [nan, 8.0]"),
        (read_csv, CSV.replace("0.5", "0.1"), "scanpath b: t=[0.1, 0.1] must be finite and differ"),
        (read_csv, CSV.replace("0.5", "inf"), "scanpath b: t=[inf, 0.1] must be finite"),
        (
            read_csv,
            CSV.replace("a,desk.jpg,cup,1", "a,sink.jpg,cup,1"),
            "line 5: scanpath a is of desk.jpg and sink.jpg",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, read: Any, content: Any, says: str):
    path = write(tmp_path / "data.file", content)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("read", [read_sti, read_coco_search, read_csv])
def test_a_file_that_is_not_there(tmp_path: Path, read: Any):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda data: data.select(["a", "q"]), "images q are not in the data, which have a, b"),
        (lambda data: split_by_image(data, {"train": ["q"]}), "images q are not in the data"),
        (lambda data: draw_split(data, {"train": 0.5, "test": 0.4}), "must be positive and sum to 1"),
        (lambda data: draw_split(data, {"train": 1.5, "test": -0.5}), "must be positive and sum to 1"),
        (lambda data: draw_split(data, {}), "must be positive and sum to 1"),
        (lambda data: draw_split(data, {"train": 0.8, "val": 0.1, "test": 0.1}), "2 pictures are too few"),
    ],
)
def test_a_bad_split_is_named(call: Any, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(made({"a": "x", "b": "x"}))


# --- real eye-tracking, where it is at hand ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sti() -> Path:
    """The folder of `Amazon.json` and `split.json`."""
    if not (folder := os.environ.get("ATTNSUITE_STI")):
        pytest.skip("ATTNSUITE_STI does not name the folder of the STI data")
    return Path(folder)


def test_the_covers_of_the_real_data_lie_on_the_grid_that_their_targets_tell(sti: Path):
    data = read_sti(sti / "Amazon.json")
    assert (len(data.scenes), len({scene.target for scene in data.scenes})) == (100, 5)
    boxes, sizes = [scene.target_box for scene in data.scenes], [scene.size for scene in data.scenes]
    grid = RegularGrid.fit(boxes, sizes, 6, 14)
    targets = []
    for scene in data.scenes:
        assert scene.size is not None and scene.target_box is not None
        objects = grid.on(scene.size)
        targets.append(objects.index(scene.target_box))
        box = np.array(scene.target_box)
        off = np.abs((box[:2] + box[2:]) / 2 - objects.centres[targets[-1]])
        assert off[0] < 20 and off[1] < 6
    assert len(set(targets)) > 40


def test_people_of_the_real_data_are_as_alike_as_was_measured_elsewhere(sti: Path):
    """On the test pictures, each person foretold by the five others; figures of another implementation."""
    data = read_sti(sti / "Amazon.json")
    split = json.loads((sti / "split.json").read_text())
    parts = split_by_image(data, {name: split[name] for name in ("train", "val", "test")})
    assert [len(part.scanpaths) for part in parts.values()] == [330, 60, 120]
    grid = RegularGrid.fit([s.target_box for s in data.scenes], [s.size for s in data.scenes], 6, 14)
    by_picture = []
    model, human, every, targets = [], [], [], []
    for scene, scanpaths in parts["test"].by_scene().items():
        assert scene.size is not None and scene.target_box is not None
        objects = grid.on(scene.size)
        paths = [objects.at(scanpath.fixations) for scanpath in scanpaths]
        every += paths
        targets += [objects.index(scene.target_box)] * len(paths)
        pairs = [(a, b) for a in paths for b in paths if a is not b]
        model += [a for a, _ in pairs]
        human += [b for _, b in pairs]
        points = [(a.fixations, b.fixations) for a in scanpaths for b in scanpaths if a is not b]
        by_picture.append(multimatch([a for a, _ in points], [b for _, b in points], scene.size))
    cells = grid.on((2560, 1600)).cells
    assert sequence_score(model, human).mean() == pytest.approx(0.214, abs=5e-4)
    assert fixation_edit_distance(model, human).mean() == pytest.approx(15.4, abs=0.05)
    assert scanmatch(model, human, cells).mean() == pytest.approx(0.358, abs=5e-4)
    for dimension, expected in (("direction", 0.684), ("position", 0.814)):
        assert np.mean([values[dimension].mean() for values in by_picture]) == pytest.approx(expected, abs=5e-4)
    habits = behaviour(every, targets)
    assert habits["found"] == pytest.approx(0.91, abs=0.005) and habits["steps"] == pytest.approx(13.3, abs=0.05)
