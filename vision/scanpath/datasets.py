"""Recorded scanpaths: readers for three layouts, and parts of them that share no picture.

* `read_sti`: search target inference on collages (Sattar et al., CVPR 2015; Stauden et al., KI 2018).
* `read_coco_search`: COCO-Search18 (Chen et al., Scientific Reports 11, 2021).
* `read_csv`: a table with the columns scanpath_id, image, target, t, x, y.

Several people look at each picture, and their scanpaths are alike. A model must be judged on pictures that it was not
trained on: parts are made of pictures, never of scanpaths, and a picture in two of them is an error.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vision.scanpath.objects import Box, load_json
from vision.scanpath.pairs import checked_points

__all__ = [
    "Scanpath",
    "ScanpathDataset",
    "Scene",
    "check_disjoint",
    "draw_split",
    "drop_outliers",
    "read_coco_search",
    "read_csv",
    "read_sti",
    "split_by_image",
]


@dataclass(frozen=True)
class Scene:
    """A picture and what is searched for in it.

    Attributes:
        image: name of the picture.
        target: name of what is searched for; of the STI data that of its picture.
        size: width and height of the picture in pixels, where known.
        target_box: where the target is, where known; None also where it is absent.
    """

    image: str
    target: str
    size: tuple[int, int] | None = None
    target_box: Box | None = None


@dataclass(frozen=True, eq=False)
class Scanpath:
    """The fixations of one search.

    Attributes:
        id: its name in the data.
        scene: what was looked at.
        fixations: `[T, 2]`, x and y in pixels of the picture, float64. T may be 0; places may lie outside the picture.
        durations: of the fixations, `[T]`, in seconds, where known.
        person: who looked, where known.
    """

    id: str
    scene: Scene
    fixations: np.ndarray
    durations: np.ndarray | None = None
    person: str | None = None

    def __len__(self) -> int:
        return len(self.fixations)


@dataclass(frozen=True, eq=False)
class ScanpathDataset:
    """Scanpaths, and the scenes that they are of.

    Attributes:
        scenes: in the order of the data; some may have no scanpath.
        scanpaths: in the order of the data.
    """

    scenes: tuple[Scene, ...]
    scanpaths: tuple[Scanpath, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the pictures, each once."""
        return tuple(dict.fromkeys(scene.image for scene in self.scenes))

    def by_scene(self) -> dict[Scene, list[Scanpath]]:
        """The scanpaths of each scene, also of those without any."""
        groups: dict[Scene, list[Scanpath]] = {scene: [] for scene in self.scenes}
        for scanpath in self.scanpaths:
            groups[scanpath.scene].append(scanpath)
        return groups

    def select(self, images: Iterable[str]) -> ScanpathDataset:
        """All that belongs to some pictures.

        Raises:
            ValueError: a picture that is not in the data.
        """
        wanted = set(images)
        if unknown := sorted(wanted - set(self.images)):
            raise ValueError(f"images {_some(unknown)} are not in the data, which have {_some(self.images)}.")
        return ScanpathDataset(
            tuple(scene for scene in self.scenes if scene.image in wanted),
            tuple(scanpath for scanpath in self.scanpaths if scanpath.scene.image in wanted),
        )


def drop_outliers(
    dataset: ScanpathDataset, deviations: float = 3.0, reference: ScanpathDataset | None = None
) -> ScanpathDataset:
    """Leaves out scanpaths whose number of fixations is unusual: more than so many standard deviations from the mean.

    Args:
        dataset: what to choose from.
        deviations: the paper's are 3.
        reference: whose mean and standard deviation count; None for the data's own. Of a part for testing give that for
            training, or leave all of it in, which is what people did.

    Returns:
        The same scenes, also those that no scanpath is left of.

    Raises:
        ValueError: deviations that are not positive, a reference without scanpaths.
    """
    if not deviations > 0:
        raise ValueError(f"deviations={deviations} must be positive.")
    lengths = np.array([len(path) for path in (reference or dataset).scanpaths])
    if not len(lengths):
        raise ValueError("no scanpaths to tell usual lengths from.")
    reach = deviations * lengths.std()
    kept = tuple(path for path in dataset.scanpaths if abs(len(path) - lengths.mean()) <= reach)
    return ScanpathDataset(dataset.scenes, kept)


def split_by_image(dataset: ScanpathDataset, parts: Mapping[str, Iterable[str]]) -> dict[str, ScanpathDataset]:
    """Parts of a data set that share no picture.

    Args:
        dataset: what to split.
        parts: name of each part → names of its pictures. Pictures that are in no part are left out.

    Returns:
        Name → part.

    Raises:
        ValueError: a picture in two parts, a picture that is not in the data.
    """
    result = {name: dataset.select(images) for name, images in parts.items()}
    check_disjoint(result)
    return result


def check_disjoint(parts: Mapping[str, ScanpathDataset]) -> None:
    """Makes sure that no picture is in two parts, such as those that come from different files.

    Args:
        parts: name → part.

    Raises:
        ValueError: a picture in two parts.
    """
    for (name, part), (other_name, other) in combinations(parts.items(), 2):
        if shared := sorted(set(part.images) & set(other.images)):
            raise ValueError(
                f"{len(shared)} pictures are in {name} and in {other_name}: {_some(shared)}. People look alike at one "
                "picture, so figures would be too good; split by picture."
            )


def draw_split(dataset: ScanpathDataset, shares: Mapping[str, float], seed: int = 0) -> dict[str, tuple[str, ...]]:
    """Draws the pictures of each part, so that each target is in all parts in the same proportion, as far as it can be.

    Args:
        dataset: what is to be split.
        shares: name of each part → its share of the pictures; they sum to 1.
        seed: another one gives another split; the same one the same.

    Returns:
        Name → pictures, for `split_by_image`.

    Raises:
        ValueError: shares that are not positive or do not sum to 1, or fewer pictures than give each part one.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares={dict(shares)} must be positive and sum to 1.")
    target_of = {scene.image: scene.target for scene in reversed(dataset.scenes)}
    rng = np.random.default_rng(seed)
    images = dataset.images
    drawn = sorted((images[n] for n in rng.permutation(len(images))), key=lambda image: target_of[image])
    parts: dict[str, list[str]] = {name: [] for name in shares}
    # Target by target, each picture goes to the part that lacks most: every target is in proportion, and so are all.
    for count, image in enumerate(drawn, 1):
        lacking = max(shares, key=lambda name: shares[name] * count - len(parts[name]))
        parts[lacking].append(image)
    if empty := [name for name, images in parts.items() if not images]:
        raise ValueError(f"{len(drawn)} pictures are too few for {dict(shares)}: none is left for {_some(empty)}.")
    return {name: tuple(images) for name, images in parts.items()}


def read_sti(path: str | Path) -> ScanpathDataset:
    """Reads the layout of the search target inference data: collages, of which people sought one cover.

    One JSON object, name of a picture → its `size` (width, height), `target` (name of a picture), `ground_truth` (xmin,
    ymin, xmax, ymax of the target, alone or in a list) and `fixations` (person → list of x, y). The covers of the part
    "AmazonCovers" lie on a grid of 6 rows and 14 columns, which `RegularGrid.fit` finds from the targets' boxes. Mind
    the data's licence, CC BY-NC-SA 4.0.

    Args:
        path: the JSON file.

    Returns:
        The order of the file; pictures without scanpaths are there as scenes. No durations.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another layout, coordinates that are not finite.
    """
    content = load_json(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected an object, name of a picture → its scanpaths, got {_kind(content)}.")
    scenes, scanpaths = [], []
    for image, entry in content.items():
        where = f"{path}, {image}"
        try:
            box = entry["ground_truth"][0] if isinstance(entry["ground_truth"], Sequence) else entry["ground_truth"]
            target_box = _box(box["xmin"], box["ymin"], box["xmax"], box["ymax"])
            size = int(entry["size"]["width"]), int(entry["size"]["height"])
            scenes.append(Scene(image, entry["target"], size, target_box))
            people = dict(entry["fixations"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: not of the STI layout ({type(error).__name__}: {error}).") from error
        for person, fixations in people.items():
            points = checked_points(fixations, f"{where}, person {person}")[:, :2]
            scanpaths.append(Scanpath(f"{image}/{person}", scenes[-1], points, person=person))
    return ScanpathDataset(tuple(scenes), tuple(scanpaths))


def read_coco_search(
    path: str | Path, part: str | None = None, size: tuple[int, int] = (1680, 1050)
) -> ScanpathDataset:
    """Reads the layout of COCO-Search18: photographs, in which people sought a kind of object.

    A JSON list with an object for each search: `name` of the picture, `task` (the kind), `subject`, `X` and `Y`, and
    where they are there `T` (durations in ms), `bbox` (x, y, width, height of the target) and `split`. The first
    fixation is the one on the cross before the picture appears.

    Args:
        path: the JSON file.
        part: only the searches of this `split`, such as 'train'; None for all. Check parts by `check_disjoint`: there
            are several splits of the data, and pictures that are searched for several kinds.
        size: width and height of the pictures that the coordinates are of: the data's, padded, by default.

    Returns:
        The order of the file; a scene for each picture and kind. A target is absent where there is no `bbox`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another layout, coordinates that are not finite, nothing in that part.
    """
    content = load_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of searches, got {_kind(content)}.")
    scanpaths = []
    for n, entry in enumerate(content):
        where = f"{path}, search {n}"
        try:
            if part is not None and entry["split"] != part:
                continue
            columns = {name: entry[name] for name in ("X", "Y", "T") if name in entry or name != "T"}
            lengths = {name: len(column) for name, column in columns.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"lengths {lengths} differ")
            fixations = list(zip(*columns.values(), strict=True))
            x, y, width, height = entry.get("bbox") or (0, 0, 0, 0)
            box = _box(x, y, x + width, y + height) if entry.get("bbox") else None
            scene, person = Scene(str(entry["name"]), str(entry["task"]), size, box), str(entry["subject"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: not of COCO-Search18's layout ({type(error).__name__}: {error}).") from error
        points = checked_points(fixations, where)
        durations = points[:, 2] / 1000 if "T" in entry else None
        name = f"{scene.image}/{scene.target}/{person}"
        scanpaths.append(Scanpath(name, scene, points[:, :2], durations, person))
    if not scanpaths:
        raise ValueError(f"{path}: no searches{'' if part is None else f' of split {part!r}'}.")
    return ScanpathDataset(tuple(dict.fromkeys(scanpath.scene for scanpath in scanpaths)), tuple(scanpaths))


_COLUMNS = ("scanpath_id", "image", "target", "t", "x", "y")


def read_csv(path: str | Path) -> ScanpathDataset:
    """Reads a table with a fixation in each row, in any order.

    Args:
        path: a CSV file with the columns scanpath_id, image, target, t (the order of the fixations: their number or
            the time they began), x and y (pixels). Other columns are not looked at.

    Returns:
        In the order of the first row of each scanpath. No sizes, boxes, durations, people.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column or a number that is missing, coordinates that are not finite, a scanpath of two pictures or
            targets, or with two fixations at one time; no rows.
    """
    rows: dict[str, list[tuple[float, float, float]]] = {}
    scenes: dict[str, Scene] = {}
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {_some(missing)}; expected {', '.join(_COLUMNS)}.")
        for row in reader:
            where, key = f"{path}, line {reader.line_num}", row["scanpath_id"]
            scene = Scene(row["image"], row["target"])
            if scenes.setdefault(key, scene) != scene:
                raise ValueError(
                    f"{where}: scanpath {key} is of {scenes[key].image} and {scene.image}, or two targets."
                )
            try:
                rows.setdefault(key, []).append((float(row["t"]), float(row["x"]), float(row["y"])))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: t, x and y must be numbers ({error}).") from error
    if not rows:
        raise ValueError(f"{path} has no rows.")
    scanpaths = [Scanpath(key, scenes[key], _in_time(fixes, f"{path}, scanpath {key}")) for key, fixes in rows.items()]
    return ScanpathDataset(tuple(dict.fromkeys(scenes.values())), tuple(scanpaths))


def _in_time(rows: list[tuple[float, float, float]], what: str) -> np.ndarray:
    """Rows of t, x, y → `[T, 2]` in the order of t."""
    times = np.array([t for t, _, _ in rows])
    if not np.isfinite(times).all() or len(np.unique(times)) < len(times):
        raise ValueError(f"{what}: t={times.tolist()} must be finite and differ; it gives the order of the fixations.")
    return checked_points([rows[n][1:] for n in np.argsort(times)], what)[:, :2]


def _kind(content: Any) -> str:
    return {list: "a list", dict: "an object"}.get(type(content), type(content).__name__)


def _box(left: Any, upper: Any, right: Any, lower: Any) -> Box:
    return float(left), float(upper), float(right), float(lower)


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
