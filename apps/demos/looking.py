"""Scanpaths over one picture: its objects, where a searcher might look, and beside that where people looked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gradio as gr
import numpy as np
import torch
from PIL import Image

from vision.scanpath import draw, metrics
from vision.scanpath.appearance import cut
from vision.scanpath.model import OAT
from vision.scanpath.objects import Objects

from ..batch.stage import pick_device
from ..errors import UsageError
from ..scanpath.command import OATChoice, Search
from ..scanpath.stage import sampled, write_film, write_table
from .downloads import handed_out
from .host import Host, fetching

__all__ = ["MOST_SCANPATHS", "Looked", "drawn", "likeness", "outlined", "search", "step"]

MOST_SCANPATHS = 100
_SIDE = 640


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
        `scanpaths`, of the first search, and `density`, arrays; `film`, of the first few, and `table`, files.
    """
    side = _side(picture)
    points, humans = looked.fixations(), [*people.values()]
    shown: Any = {"search 1": points[0], "person 1": humans[0]} if humans else points[0]
    first = draw.draw_scanpaths(picture, shown, target=looked.target_box, objects=looked.objects, longer_side=side)
    density = draw.draw_density(picture, points, longer_side=side)
    with tempfile.TemporaryDirectory() as folder:
        film, table = Path(folder, "scanpaths.gif"), Path(folder, "scanpaths.csv")
        write_film(str(film), picture, looked.objects, looked.target, points, humans)
        write_table(str(table), "picture", str(looked.target + 1), looked.objects, looked.paths)
        files = {"film": handed_out(film.name, film.read_bytes()), "table": handed_out(table.name, table.read_bytes())}
    return {"scanpaths": np.asarray(first), "density": np.asarray(density), **files}


def _side(picture: Image.Image) -> int:
    return max(64, min(_SIDE, 4 * max(picture.size)))


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
    about: dict[str, Any] = {"target": looked.target_box, "objects": looked.objects}
    return np.asarray(draw.draw_scanpaths(picture, points, **about, longer_side=_side(picture)))


def _mean(values: Any) -> float | None:
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    return round(float(finite.mean()), 4) if len(finite) else None
