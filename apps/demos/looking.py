"""Scanpaths over one picture: its objects, where a searcher might look, and beside that where people looked."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
import torch
from PIL import Image

from vision.scanpath import draw, metrics
from vision.scanpath.appearance import cut
from vision.scanpath.datasets import read_csv
from vision.scanpath.model import OAT
from vision.scanpath.objects import Objects, RegularGrid, read_objects

from ..batch.stage import pick_device
from ..errors import UsageError
from ..scanpath.command import OATChoice, Search
from ..scanpath.stage import sampled, write_table
from .downloads import handed_out
from .host import Host, fetching

__all__ = [
    "MOST_SCANPATHS",
    "Looked",
    "drawn",
    "likeness",
    "objects_of",
    "outlined",
    "people_of",
    "search",
    "step",
    "target_of",
]

MOST_SCANPATHS = 100
_MOST_OBJECTS = 400
_SIDE = 640
_MOST_BYTES = 2_000_000


@dataclass(frozen=True, eq=False)  # a state of Gradio's, which compares by identity
class Looked:
    """What came of a search.

    Attributes:
        objects: Of the picture.
        target: Which of them was searched for.
        paths: Objects of each scanpath, `[T]`.
    """

    objects: Objects
    target: int
    paths: Sequence[np.ndarray]

    @property
    def found(self) -> float:
        """Share of the scanpaths that end on the target."""
        return float(np.mean([path[-1] == self.target for path in self.paths]))

    @property
    def steps(self) -> float:
        """Fixations of a scanpath, on average."""
        return float(np.mean([len(path) for path in self.paths]))

    @property
    def target_box(self) -> tuple[float, float, float, float]:
        """Left, upper, right, lower, in pixels."""
        left, upper, right, lower = self.objects.boxes[self.target].tolist()
        return left, upper, right, lower

    def fixations(self) -> list[np.ndarray]:
        """Of each scanpath, `[T, 2]`, x and y in pixels."""
        return [self.objects.centres[path] for path in self.paths]


def objects_of(size: tuple[int, int], rows: int, columns: int, boxes: str, file: str | None) -> Objects:
    """The objects of a picture: boxes where there are any, else a grid.

    Args:
        size: Width and height of the picture.
        rows: Of the grid.
        columns: Of the grid.
        boxes: A box a line: left, upper, right, lower in pixels, and a name if wanted.
        file: With boxes, as `vision.scanpath.objects.read_objects` takes it.

    Returns:
        With cells, which are fractions of rows and columns where boxes lie freely.

    Raises:
        UsageError: A box that is none, a file that cannot be read, or too many objects.
    """
    try:
        grid = RegularGrid(rows, columns)
        if not boxes.strip() and file is None:
            found = grid.on(size)
        else:
            objects = _of_lines(boxes, size) if boxes.strip() else _of_file(str(file), size)
            cells = objects.centres[:, ::-1] / (size[1], size[0]) * (rows, columns) - 0.5
            found = replace(objects, cells=cells.clip(0))
    except ValueError as error:
        raise UsageError(f"the objects cannot be taken: {_nameless(error, file)}") from error
    if len(found) > _MOST_OBJECTS:
        raise UsageError(f"{len(found)} objects are too many: at most {_MOST_OBJECTS} are taken")
    return found


def target_of(objects: Objects, target: str, columns: int) -> int:
    """Which object is searched for.

    Args:
        objects: Of the picture.
        target: `"2, 5"` for row and column of a grid, `"7"` for the seventh object, or its name; counted from 1.
        columns: Of the grid.

    Raises:
        UsageError: There is no such object.
    """
    text = target.strip()
    pair = re.fullmatch(r"(\d{1,4})\s*[,x×]\s*(\d{1,4})", text)
    if objects.labels is None and pair:
        row, column = int(pair[1]), int(pair[2])
        if not (1 <= column <= columns and 1 <= row <= len(objects) // columns):
            raise UsageError(f"target {text}: the grid has rows 1 to {len(objects) // columns}, columns 1 to {columns}")
        return (row - 1) * columns + column - 1
    if re.fullmatch(r"\d{1,4}", text):
        if not 1 <= int(text) <= len(objects):
            raise UsageError(f"target {text}: there are {len(objects)} objects, counted from 1")
        return int(text) - 1
    if not text:
        raise UsageError("no target: give row and column such as 2, 5, the number of an object, or its name")
    try:
        return objects.index(text)
    except ValueError as error:
        raise UsageError(f"target {text}: {error}") from error


def search(
    host: Host, picture: Image.Image, objects: Objects, target: int, how: Search, progress: gr.Progress
) -> Looked:
    """Samples scanpaths.

    Args:
        host: The server.
        picture: RGB.
        objects: With cells.
        target: Which of them is searched for.
        how: How often, how freely, and the seed; its grid and target are not looked at.
        progress: Told what is waited for.

    Raises:
        UsageError: The model does not reach so far, or its files are not there.
    """
    resolved = OATChoice(host.settings.model or OATChoice.model).resolve()
    device = pick_device(host.settings.device)

    def load() -> OAT:
        progress(0, desc=f"Loading {resolved.label}")
        return cast(OAT, resolved.load(fetching(resolved.label, progress)).module.to(device))

    key = ("scanpath", resolved.label, resolved.identity)
    with host.pool.use(key, load, lambda: progress(0, desc="Waiting for others to be done")) as model:
        progress(0.5, desc="Looking")
        extent = [int(side) for side in model.config.extent]
        assert objects.cells is not None
        if (objects.cells > (extent[0] - 1, extent[1] - 1)).any():
            raise UsageError(f"the model knows grids of up to {extent[0]} rows and {extent[1]} columns")
        crops = cast(torch.Tensor, cut(picture, objects, model.config.crop_size))
        return Looked(objects, target, sampled(model, objects, target, crops, how, device))


def people_of(file: str, image: str | None) -> dict[str, np.ndarray]:
    """Recorded scanpaths of one picture.

    Args:
        file: CSV as `vision.scanpath.datasets.read_csv` reads it.
        image: Which picture's, where the file has several.

    Returns:
        Fixations by name of the scanpath, `[T, 2]`, x and y in pixels.

    Raises:
        UsageError: The file cannot be read, or has nothing of that picture.
    """
    _check_size(file)
    try:
        data = read_csv(file)
    except (ValueError, KeyError) as error:
        raise UsageError(f"the recorded scanpaths cannot be read: {_nameless(error, file)}") from error
    wanted = image or (data.images[0] if len(data.images) == 1 else None)
    found = {one.id: one.fixations for one in data.scanpaths if one.scene.image == wanted and len(one)}
    if not found:
        names = ", ".join(data.images[:8])
        raise UsageError(f"which picture's scanpaths are meant? The file has those of {names}: give one of these names")
    return found


def likeness(looked: Looked, people: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """How alike sampled and recorded scanpaths are, and recorded ones among each other, on average over all pairs.

    Args:
        looked: The search.
        people: Fixations of each recorded scanpath.

    Returns:
        A row for each metric; `people` is None where there is one recorded scanpath only.
    """
    objects, size = looked.objects, looked.objects.size
    humans = list(people.values())
    seen = [objects.at(path) for path in humans]
    crossed = [(a, b) for a in range(len(looked.paths)) for b in range(len(humans))]
    among = [(a, b) for a in range(len(humans)) for b in range(a)]
    unit = tuple(float(side) for side in np.median(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=0))
    ids, points = [np.asarray(path) for path in looked.paths], looked.fixations()

    def every(pairs: Sequence[tuple[int, int]], a_ids: Any, a_points: Any) -> dict[str, float | None]:
        if not pairs:
            return {}
        objects_a, objects_b = [a_ids[a] for a, _ in pairs], [seen[b] for _, b in pairs]
        points_a, points_b = [a_points[a] for a, _ in pairs], [humans[b] for _, b in pairs]
        shapes = metrics.multimatch(points_a, points_b, size)
        return {
            "Sequence score": _mean(metrics.sequence_score(objects_a, objects_b)),
            "Edit distance": _mean(metrics.fixation_edit_distance(objects_a, objects_b)),
            "ScanMatch": _mean(metrics.scanmatch(points_a, points_b, unit=cast(Any, unit))),
            **{f"MultiMatch, {name}": _mean(values) for name, values in shapes.items() if name != "duration"},
        }

    model, humans_among = every(crossed, ids, points), every(among, seen, humans)
    return [
        {"metric": name, "model": value, "people": humans_among.get(name), "means": _MEANS[name.partition(",")[0]]}
        for name, value in model.items()
    ]


_MEANS = {
    "Sequence score": "share of objects visited in the same order; 1 is best",
    "Edit distance": "fixations to change, add or leave out; 0 is best",
    "ScanMatch": "alignment in which near misses count in part; 1 is best",
    "MultiMatch": "likeness of the saccades' shape; 1 is best",
}


def drawn(picture: Image.Image, looked: Looked, people: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Pictures and files of a search.

    Args:
        picture: RGB.
        looked: The search.
        people: Recorded scanpaths; may be none.

    Returns:
        `scanpaths` and `density`, arrays; `film` and `table`, files.
    """
    points = looked.fixations()
    shown: Any = points[0] if not people else {"model": points[0], "people": next(iter(people.values()))}
    side = max(64, min(_SIDE, 4 * max(picture.size)))
    about: dict[str, Any] = {"target": looked.target_box, "objects": looked.objects}
    first = draw.draw_scanpaths(picture, shown, **about, longer_side=side)
    density = draw.draw_density(picture, points, longer_side=side)
    with tempfile.TemporaryDirectory() as folder:
        film, table = Path(folder, "scanpath.gif"), Path(folder, "scanpaths.csv")
        draw.write_gif(film, picture, shown, **about, longer_side=min(side, 480))
        write_table(str(table), "picture", str(looked.target + 1), looked.objects, looked.paths)
        files = {"film": handed_out(film.name, film.read_bytes()), "table": handed_out(table.name, table.read_bytes())}
    return {"scanpaths": np.asarray(first), "density": np.asarray(density), **files}


def outlined(picture: Image.Image, objects: Objects, target: int) -> np.ndarray:
    """A picture with its objects and the target.

    Args:
        picture: RGB.
        objects: Outlined.
        target: Which of them is framed.
    """
    return step(picture, Looked(objects, target, [np.array([], int)]), 1, 0)


def step(picture: Image.Image, looked: Looked, number: int, fixations: int) -> np.ndarray:
    """One sampled scanpath up to a fixation.

    Args:
        picture: RGB.
        looked: The search.
        number: Which scanpath, from 1.
        fixations: How many of its fixations.
    """
    points = looked.fixations()[min(max(number, 1), len(looked.paths)) - 1][:fixations]
    side = max(64, min(_SIDE, 4 * max(picture.size)))
    return np.asarray(
        draw.draw_scanpaths(picture, points, target=looked.target_box, objects=looked.objects, longer_side=side)
    )


def _of_lines(text: str, size: tuple[int, int]) -> Objects:
    boxes, labels = [], []
    lines = [line for line in text.splitlines() if line.strip()][: _MOST_OBJECTS + 1]
    for number, line in enumerate(lines, 1):
        *sides, label = [part.strip() for part in (line if line.count(",") > 3 else f"{line},").split(",", 4)]
        try:
            box = [float(side) for side in sides]
            if len(box) != 4:
                raise ValueError
        except ValueError as error:
            raise UsageError(
                f"line {number} of the boxes, {line.strip()[:60]!r}: expected left, upper, right, lower"
            ) from error
        boxes.append(box)
        labels.append(label or str(number))
    return Objects(np.array(boxes), size, labels=tuple(labels))


def _of_file(path: str, size: tuple[int, int]) -> Objects:
    _check_size(path)
    return read_objects(path, size)


def _check_size(path: str) -> None:
    if Path(path).stat().st_size > _MOST_BYTES:
        raise UsageError(f"the table has more than {_MOST_BYTES // 1_000_000} MB: keep the rows of this picture")


def _nameless(error: Exception, file: str | None) -> str:
    """A message without the place where the server keeps the file."""
    return str(error) if file is None else str(error).replace(str(file), Path(file).name)


def _mean(values: Any) -> float | None:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    return round(float(finite.mean()), 4) if len(finite) else None
