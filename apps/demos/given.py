"""What visitors of the page Look give: objects as a grid, as lines or in a file, a target, and recorded scanpaths."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vision.scanpath.datasets import Scanpath, read_csv
from vision.scanpath.objects import Objects, RegularGrid, read_objects

from ..errors import UsageError

__all__ = ["MOST_FIXATIONS", "MOST_PEOPLE", "names_of", "objects_of", "people_of", "target_of"]

MOST_PEOPLE, MOST_FIXATIONS = 100, 60  # comparing takes as long as the square of both
_MOST_OBJECTS = 400
_MOST_BYTES = 2_000_000
# what readers raise, beside ValueError, of tables that are built in other ways than they expect
_MISBUILT = (csv.Error, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)


def objects_of(size: tuple[int, int], rows: int, columns: int, boxes: str, file: str | None) -> Objects:
    """The objects of a picture: boxes where there are any, else a grid.

    Args:
        size: Width and height of the picture.
        rows: Of the grid.
        columns: Of the grid.
        boxes: A box a line: left, upper, right, lower in pixels, and a name if wanted.
        file: With boxes, as `vision.scanpath.objects.read_objects` takes it.

    Returns:
        With cells; boxes have labels, and cells that are fractions of rows and columns.

    Raises:
        UsageError: A box that is none, a file that cannot be read, or too many objects.
    """
    given = bool(boxes.strip())
    with _read("the objects", None if given else file):
        grid = RegularGrid(rows, columns)
        if not given and file is None:
            found = grid.on(size)
        else:
            objects = _of_lines(boxes, size) if given else read_objects(str(file), size)
            cells = objects.centres[:, ::-1] / (size[1], size[0]) * (rows, columns) - 0.5
            labels = objects.labels or range(1, len(objects) + 1)
            found = replace(objects, cells=cells.clip(0), labels=tuple(map(str, labels)))
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


def names_of(objects: Objects, target: int, columns: int) -> list[str]:
    """What a target may be called in a file of recorded scanpaths.

    Args:
        objects: Of the picture.
        target: Which of them.
        columns: Of the grid.
    """
    if objects.labels is not None:
        return [objects.labels[target], str(target + 1)]
    row, column = target // columns + 1, target % columns + 1
    return [f"row {row}, column {column}", f"{row}, {column}", f"{row},{column}", str(target + 1)]


def people_of(file: str, size: tuple[int, int], image: str | None, targets: Collection[str]) -> dict[str, np.ndarray]:
    """Recorded scanpaths of one picture and one target.

    Args:
        file: CSV as `vision.scanpath.datasets.read_csv` reads it.
        size: Width and height of the picture.
        image: Which picture's, where the file has several.
        targets: What the target may be called; looked at where the file has several of that picture.

    Returns:
        Fixations by name of the scanpath, `[T, 2]`, x and y in pixels.

    Raises:
        UsageError: The file cannot be read, has nothing of that picture and target, or more than can be compared.
    """
    with _read("the recorded scanpaths", file):
        data = read_csv(file)
    wanted = image or (data.images[0] if len(data.images) == 1 else None)
    found = [one for one in data.scanpaths if one.scene.image == wanted]
    if not found:
        raise UsageError(
            f"which picture's scanpaths are meant? The file has those of {_some(data.images)}: give one of these names"
        )
    searched = list(dict.fromkeys(str(one.scene.target) for one in found))
    if len(searched) > 1:
        found = [one for one in found if str(one.scene.target) in targets]
        if not found:
            raise UsageError(
                f"the recorded scanpaths are of searches for {_some(searched)}, and none of these is called "
                f"{' or '.join(map(repr, targets))}: rename the target in the file, or keep the rows of one"
            )
    _check_extent(found, size)
    return {one.id: one.fixations for one in found}


def _check_extent(found: list[Scanpath], size: tuple[int, int]) -> None:
    """Refuses what takes too long to compare, and what was recorded over another picture."""
    longest = max(map(len, found))
    if len(found) > MOST_PEOPLE or longest > MOST_FIXATIONS:
        raise UsageError(
            f"{len(found)} recorded scanpaths of up to {longest} fixations are too many: "
            f"at most {MOST_PEOPLE} of up to {MOST_FIXATIONS} are compared"
        )
    points = np.concatenate([one.fixations for one in found])
    inside = ((points >= 0) & (points <= size)).all(1)
    far = (np.abs(points - np.array(size) / 2) > 1.5 * np.array(size)).any()
    if far or inside.mean() < 0.5:
        x, y = (f"{side:g}" for side in points[~inside][0])
        raise UsageError(
            f"the recorded scanpaths are of another picture: a fixation lies at {x}, {y}, and {inside.mean():.0%} of "
            f"all lie in this picture of {size[0]} × {size[1]} pixels"
        )


@contextlib.contextmanager
def _read(what: str, file: str | None) -> Iterator[None]:
    """Says what is wrong with a table, without the place where the server keeps it."""
    try:
        if file is not None and Path(file).stat().st_size > _MOST_BYTES:
            raise UsageError(f"the table has more than {_MOST_BYTES // 1_000_000} MB: keep the rows of this picture")
        yield
    except FileNotFoundError as error:
        raise UsageError(f"{what} are no longer here, as files are removed after a while: upload them again") from error
    except ValueError as error:
        message = str(error) if file is None else str(error).replace(str(file), Path(file).name)
        raise UsageError(f"{what} cannot be read: {message}") from error
    except _MISBUILT as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{what} cannot be read, as the file is built in another way: {reason}") from error


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


def _some(names: Collection[str]) -> str:
    """The first few of many names."""
    return ", ".join([*names][:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
