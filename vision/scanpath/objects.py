"""The objects of a picture: where they are, and which of them a fixation falls on.

They are given as boxes (`Objects`, `read_objects`), laid out as a regular grid (`RegularGrid`), or proposed from the
picture (`propose`). An object is known by its index, in the order of the boxes; of a grid row by row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torchvision.ops import box_iou, nms

from vision.scanpath.pairs import as_array, checked_points

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Box", "Objects", "Proposal", "RegularGrid", "load_json", "propose", "read_objects"]

Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels of the picture."""
Proposal = Literal["contours", "selective_search"]

_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one picture.

    Boxes may overlap, and one may lie inside another. What lies outside the picture is cut off.

    Attributes:
        boxes: `[N, 4]`, left, upper, right, lower, in pixels; any array-like of that shape, then float64, read-only.
        size: width and height of the picture.
        labels: a name for each object, or None; names may repeat.
        cells: row and column of each object in its grid, `[N, 2]`, or None where they lie freely.

    Raises:
        ValueError: no box, one that is not finite, has no area or lies outside the picture; a size that is not
            positive; more or fewer labels or cells than boxes.
    """

    boxes: np.ndarray
    size: tuple[int, int]
    _: KW_ONLY
    labels: tuple[str, ...] | None = None
    cells: np.ndarray | None = None

    def __post_init__(self) -> None:
        width, height = self.size
        if not (width > 0 and height > 0):
            raise ValueError(f"size={self.size}: expected the width and height of the picture, in pixels.")
        boxes = np.array(as_array(self.boxes), float)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
            raise ValueError(f"boxes: expected [N, 4] with N at least 1, got {list(boxes.shape)}.")
        for n, box in enumerate(boxes):
            _check_box(box, self.size, f"object {n}")
        np.clip(boxes, 0, (width, height, width, height), out=boxes)
        object.__setattr__(self, "boxes", _frozen(boxes))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
        if self.cells is not None:
            object.__setattr__(self, "cells", _frozen(np.array(as_array(self.cells), float)))
            if self.cells.shape != (len(boxes), 2):
                raise ValueError(f"cells {list(self.cells.shape)}: expected {[len(boxes), 2]}, one for each box.")
        if self.labels is not None and len(self.labels) != len(boxes):
            raise ValueError(f"{len(self.labels)} labels for {len(boxes)} boxes.")

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def centres(self) -> np.ndarray:
        """Of the boxes, `[N, 2]`, x and y in pixels."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    def at(self, fixations: ArrayLike) -> np.ndarray:
        """The object that each fixation falls on.

        That is the one whose box the fixation is in, edges included; of several the smallest, of equally large ones
        that with the nearest centre. A fixation in no box, also one outside the picture, belongs to the object with the
        nearest centre. Of equally near ones the first.

        Args:
            fixations: `[T, 2]`, x and y in pixels; may be empty. A third column is not looked at.

        Returns:
            `[T]`, int64.

        Raises:
            ValueError: coordinates that are not finite, or another shape.
        """
        points = checked_points(fixations, "fixations")[:, None, :2]  # [T, 1, 2]
        lower, upper = self.boxes[:, :2], self.boxes[:, 2:]
        inside = ((lower <= points) & (points <= upper)).all(-1)  # [T, N]
        area = np.where(inside, (upper - lower).prod(-1), np.inf)
        smallest = area == area.min(-1, keepdims=True)  # all of them where the fixation is in none
        distance = np.linalg.norm(points - self.centres, axis=-1)
        return np.where(smallest, distance, np.inf).argmin(-1)

    def index(self, target: int | str | Sequence[float]) -> int:
        """Which object is meant.

        Args:
            target: an index, a label, or a box, for which the object that overlaps most with it is taken (intersection
                over union).

        Returns:
            Its index.

        Raises:
            ValueError: no such object, several of that label, a box that no object overlaps with.
        """
        if isinstance(target, str):
            return self._labelled(target)
        if isinstance(target, int | np.integer):
            if not 0 <= target < len(self):
                raise ValueError(f"target={target} is not among the objects, which are 0 to {len(self) - 1}.")
            return int(target)
        box = np.array(target, float)
        if box.shape != (4,):
            raise ValueError(f"target={target}: expected an index, a label, or left, upper, right, lower.")
        _check_box(box, self.size, "target")
        overlaps = box_iou(torch.from_numpy(box)[None], torch.tensor(self.boxes))[0]
        if not overlaps.max() > 0:
            raise ValueError(f"target={box.tolist()} overlaps with none of the {len(self)} objects.")
        return int(overlaps.argmax())

    def _labelled(self, label: str) -> int:
        labels = self.labels or ()
        if labels.count(label) == 1:
            return labels.index(label)
        if label in labels:
            every = [n for n, other in enumerate(labels) if other == label]
            raise ValueError(f"target={label!r}: objects {every} have that label; give an index or a box.")
        known = ", ".join(sorted(set(labels))) or "nothing: the objects have no labels"
        raise ValueError(f"target={label!r} is not among the objects, which are {known}.")


@dataclass(frozen=True)
class RegularGrid:
    """Objects in rows and columns, for pictures of any size.

    All lengths are shares of the picture's width and height, x first. By default cells fill the picture.

    Attributes:
        rows: at least 1.
        columns: at least 1.
        origin: centre of the upper left object.
        pitch: from one centre to the next.
        box: extent of each object.

    Raises:
        ValueError: numbers that are not positive.
    """

    rows: int
    columns: int
    origin: tuple[float, float] | None = None
    pitch: tuple[float, float] | None = None
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"a grid of {self.rows} x {self.columns}: rows and columns count from 1.")
        for name in ("origin", "pitch", "box"):
            value = getattr(self, name)
            if value is not None and not all(np.isfinite(share) and share > 0 for share in value):
                raise ValueError(f"{name}={value}: expected positive shares of the width and height.")

    def on(self, size: tuple[int, int]) -> Objects:
        """The objects of a picture.

        Args:
            size: its width and height.

        Returns:
            Row by row; with cells.

        Raises:
            ValueError: objects that lie outside.
        """
        even = np.divide(1, (self.columns, self.rows))
        pitch = even if self.pitch is None else np.array(self.pitch)
        origin = even / 2 if self.origin is None else np.array(self.origin)
        extent = (pitch if self.box is None else np.array(self.box)) * size
        cells = np.stack(np.divmod(np.arange(self.rows * self.columns), self.columns), 1)  # row, column
        centres = (origin + pitch * cells[:, ::-1]) * size
        return Objects(np.hstack((centres - extent / 2, centres + extent / 2)), size, cells=cells)

    @classmethod
    def fit(cls, boxes: ArrayLike, sizes: ArrayLike, rows: int, columns: int) -> RegularGrid:
        """The grid that some known objects lie on, by least squares; their mean extent is that of all.

        It must fill its pictures nearly, so that dividing them evenly tells which cell each box is in.

        Args:
            boxes: `[M, 4]`, from one picture or many.
            sizes: width and height of the picture of each, `[M, 2]`, or of all, `[2]`.
            rows: of the grid.
            columns: of the grid.

        Returns:
            The grid.

        Raises:
            ValueError: boxes that are too few: a grid of more than one row (column) needs some in two.
        """
        boxes, sizes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(sizes, float)
        low, high = boxes[:, :2] / sizes, boxes[:, 2:] / sizes
        centres = (low + high) / 2
        origin, pitch = [], []
        for axis, count in enumerate((columns, rows)):
            cell = np.clip(centres[:, axis] * count // 1, 0, count - 1)
            if count == 1 and len(cell):
                slope, intercept = 1.0, centres[:, axis].mean()
            elif len(np.unique(cell)) < 2:
                raise ValueError(f"{len(boxes)} boxes do not tell where {rows} rows and {columns} columns are.")
            else:
                slope, intercept = np.polyfit(cell, centres[:, axis], 1)
            origin.append(float(intercept))
            pitch.append(float(slope))
        width, height = (high - low).mean(0)
        return cls(rows, columns, (origin[0], origin[1]), (pitch[0], pitch[1]), (float(width), float(height)))


def read_objects(path: str | Path, size: tuple[int, int] | None = None, image: str | int | None = None) -> Objects:
    """Reads boxes that somebody drew.

    * CSV: columns xmin, ymin, xmax, ymax; label and image if wanted.
    * JSON: a list of `[xmin, ymin, xmax, ymax]`, or of objects with the fields of the CSV.
    * COCO's JSON: boxes from the annotations of one image, labels from the categories; groups (`iscrowd`) are left out.

    Args:
        path: a file that ends in .csv or .json.
        size: width and height of the picture. COCO's own are taken where this is None.
        image: which picture's boxes, where the file has those of several; COCO's by file name or id.

    Returns:
        In the order of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is none of these, no boxes of that picture, boxes of several pictures without `image`,
            no size; and what `Objects` refuses.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            records: Any = list(csv.DictReader(file))
    elif path.suffix.lower() == ".json":
        records = load_json(path)
    else:
        raise ValueError(f"{path}: expected a name that ends in .csv or .json.")
    if isinstance(records, Mapping) and {"images", "annotations"} <= set(records):
        records, size = _coco_records(records, path, size, image)
    elif not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of boxes, or COCO's images and annotations.")
    records = _of_one_picture(records, path, image)
    if size is None:
        raise ValueError(f"{path} does not tell the picture's size; give size=(width, height).")
    boxes, labels = zip(*(_record(record, f"{path}, box {n}") for n, record in enumerate(records)), strict=True)
    return Objects(np.array(boxes), size, labels=None if None in labels else labels)


def load_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _coco_records(
    content: Mapping[str, Any], path: Path, size: tuple[int, int] | None, image: str | int | None
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """COCO's annotations of one image as records of a CSV, and the image's size."""
    found = [i for i in content["images"] if image is None or image in (i["id"], i.get("file_name"))]
    if len(found) != 1:
        raise ValueError(f"{path}: image={image!r} fits {len(found)} of its images; give one file name or id.")
    names = {category["id"]: category["name"] for category in content.get("categories", ())}
    records = []
    for annotation in content["annotations"]:
        if annotation["image_id"] == found[0]["id"] and not annotation.get("iscrowd"):
            x, y, width, height = annotation["bbox"]
            box = dict(zip(_SIDES, (x, y, x + width, y + height), strict=True))
            records.append(box | {"label": names.get(annotation.get("category_id"))})
    return records, size or (found[0]["width"], found[0]["height"])


def _of_one_picture(records: list[Any], path: Path, image: str | int | None) -> list[Any]:
    """The records of the picture asked for; all of them where they name none."""
    pictures = {record["image"] for record in records if isinstance(record, Mapping) and "image" in record}
    if image is None and len(pictures) > 1:
        raise ValueError(f"{path} has boxes of {len(pictures)} pictures; say which by image=….")
    chosen = [record for record in records if not pictures or image in (None, record["image"])]
    if not chosen:
        raise ValueError(f"{path} has no boxes{'' if image is None else f' of image={image!r}'}.")
    return chosen


def _record(record: Any, where: str) -> tuple[list[float], str | None]:
    """The box and label of one record."""
    label = record.get("label") if isinstance(record, Mapping) else None
    try:
        sides = [record[side] for side in _SIDES] if isinstance(record, Mapping) else record
        left, upper, right, lower = map(float, sides)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected {', '.join(_SIDES)} as numbers, got {record}.") from error
    return [left, upper, right, lower], label or None


def propose(
    picture: Image.Image | np.ndarray,
    method: Proposal = "contours",
    *,
    limit: int = 100,
    min_area: float = 0.002,
    max_overlap: float = 0.5,
) -> Objects:
    """Boxes around what looks like a thing: a start where nobody has drawn any. Not random.

    Args:
        picture: RGB; an array is `[H, W, 3]`, uint8.
        method: 'contours' encloses closed outlines, which suits things on a plain ground such as a shelf or a desk.
            'selective_search' (Uijlings et al., IJCV 2013) joins regions of like colour and texture; it needs OpenCV's
            contributed modules.
        limit: the most boxes; the largest are kept.
        min_area: of a box, as a share of the picture; those of nine tenths and more are left out too.
        max_overlap: of two boxes with a larger intersection over union, the smaller one is left out.

    Returns:
        From top to bottom by their centres.

    Raises:
        ImportError: an OpenCV without what the method needs.
        ValueError: an unknown method, a picture of another shape, nothing found.
    """
    if method not in get_args(Proposal):
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Proposal)))}.")
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    pixels = np.asarray(picture.convert("RGB") if not isinstance(picture, np.ndarray) else picture)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"picture {list(pixels.shape)}, {pixels.dtype}: expected RGB, [H, W, 3], uint8.")
    height, width = pixels.shape[:2]
    rectangles = _contours(pixels) if method == "contours" else _selective_search(pixels)
    boxes = np.array(rectangles, float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (width * height)
    usual = (area >= min_area) & (area < 0.9)
    boxes, area = torch.from_numpy(boxes[usual]), torch.from_numpy(area[usual])
    kept = boxes[nms(boxes, area, max_overlap)[:limit]].numpy()
    if not len(kept):
        raise ValueError(f"{method} found no objects in a picture of {width} x {height}; give boxes or a grid.")
    centres = kept[:, :2] + kept[:, 2:]
    return Objects(kept[np.lexsort((centres[:, 0], centres[:, 1]))], (width, height))


def _contours(pixels: np.ndarray) -> Iterable[Sequence[int]]:
    """Left, upper, width and height around each outline."""
    import cv2

    smooth = cv2.bilateralFilter(pixels, 7, 40, 7)
    # The edges of all three colours, by a threshold that adapts to how much contrast there is.
    edges = []
    for channel in cv2.split(smooth):
        high, _ = cv2.threshold(channel, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        edges.append(cv2.Canny(channel, high / 2, high))
    reach = max(3, round(min(pixels.shape[:2]) / 150) | 1)
    closed = cv2.morphologyEx(np.max(edges, axis=0), cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))
    outlines, _ = cv2.findContours(closed, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return [cv2.boundingRect(outline) for outline in outlines]


def _selective_search(pixels: np.ndarray) -> Iterable[Sequence[int]]:
    import cv2

    contributed = getattr(cv2, "ximgproc", None)
    if contributed is None or not hasattr(contributed, "segmentation"):
        raise ImportError(
            "method='selective_search' needs OpenCV's contributed modules: "
            "`pip uninstall opencv-python-headless; pip install opencv-contrib-python-headless`; or use 'contours'."
        )
    search = contributed.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(pixels[..., ::-1]))
    search.switchToSelectiveSearchFast()
    return search.process()


def _check_box(box: np.ndarray, size: tuple[int, int], what: str) -> None:
    left, upper, right, lower = box.tolist()
    if not np.isfinite(box).all():
        raise ValueError(f"{what}: box {box.tolist()} is not finite.")
    if not (left < right and upper < lower):
        raise ValueError(f"{what}: box {box.tolist()} has no area; it is left, upper, right, lower.")
    if not (right > 0 and lower > 0 and left < size[0] and upper < size[1]):
        raise ValueError(f"{what}: box {box.tolist()} lies outside the picture of {size[0]} x {size[1]} pixels.")


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
