"""Scanpaths over a grid of objects for each picture, as rows, as a table of fixations, and drawn."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image

from vision.scanpath import decoding, draw
from vision.scanpath.appearance import cut
from vision.scanpath.checkpoint import load
from vision.scanpath.model import OAT
from vision.scanpath.objects import Objects, RegularGrid
from vision.scanpath.scenes import Scenes

from ..batch.decode import Decoder, Framing, View
from ..batch.sources import encode_path
from ..batch.stage import Batch, Column, Compute, Row, Stage
from ..errors import UsageError
from ..models import Network, digest
from ..pictures import PictureFolder, write_png
from .command import Search

__all__ = ["ResolvedOAT", "ScanpathStage", "sampled", "write_film", "write_table"]

_VIEW_SIZE = 1024
_FILM_SIZE, _FILMED, _FRAMES = (
    480,
    5,
    80,
)  # pixels of the longer side; scanpaths of a film, and fixations of all of them
_COLUMNS = ("scanpath_id", "image", "target", "t", "x", "y")  # as `vision.scanpath.datasets.read_csv` reads them


@dataclass(frozen=True)
class ResolvedOAT:
    """A model of scanpaths whose files are there.

    Attributes:
        folder: With its files.
        label: What rows call it.
    """

    folder: Path
    label: str

    @property
    def identity(self) -> str:
        """A digest of its files."""
        return digest([self.folder / "config.json", self.folder / "model.safetensors"])

    def load(self, progress: Callable[[int, int | None], None]) -> Network:
        """Reads it.

        Raises:
            WeightsError: It is damaged.
            UsageError: It is not for crops of one size on a grid.
        """
        model = load(self.folder)
        config = model.config
        if config.appearance not in ("cnn", "none") or config.pyramid or config.position == "distance_2d":
            raise UsageError(
                f"--model {self.label} has appearance={config.appearance!r}, pyramid={config.pyramid}, "
                f"position={config.position!r}: expected a model for crops of one size, or none, on a grid"
            )
        size = {"input_size": (3, *config.crop_size), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        return Network(model, self.label, (), size)


@dataclass(frozen=True)
class _Crops:
    """The objects of a picture, one below the other; can be sent to other processes."""

    grid: RegularGrid
    size: tuple[int, int]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """To `(3, N * H, W)`, uint8."""
        crops = cast(torch.Tensor, cut(image, self.grid.on(image.size), self.size))
        return (crops.permute(1, 0, 2, 3).flatten(1, 2) * 255).round().byte().numpy()


class ScanpathStage(Stage):
    """Sampled scanpaths of each picture.

    Args:
        network: A model of scanpaths, as `ResolvedOAT.load` gives it.
        compute: How to run it.
        folder: Where tables and pictures go, under the names of the inputs below `root`.
        root: The deepest folder that holds all inputs.
        search: What is searched for.

    Raises:
        UsageError: The grid is larger than what the model was made for.
    """

    def __init__(self, network: Network, compute: Compute, folder: str, root: str, search: Search) -> None:
        model = cast(OAT, network.module)
        rows, columns = search.grid
        most_rows, most_columns = (int(side) for side in model.config.extent)
        if rows > most_rows or columns > most_columns:
            raise UsageError(
                f"--grid {rows}x{columns}: {network.label} knows grids of up to {most_rows} rows and {most_columns} "
                "columns"
            )
        self._grid = RegularGrid(rows, columns)
        self._size: tuple[int, int] = model.config.crop_size
        framing = Framing((rows * columns * self._size[0], self._size[1]), 1.0, "squash")
        decoder = Decoder(
            _Crops(self._grid, self._size),
            framing,
            3,
            _VIEW_SIZE if search.draws or search.films else 0,
            keep_strips=True,
        )
        super().__init__(network, compute, decoder=decoder)
        self._model, self._search = model, search
        self._target = search.target[0] * columns + search.target[1]
        self._folder = PictureFolder(folder, root)

    @property
    def columns(self) -> tuple[Column, ...]:
        """`target, found, steps, scanpaths`, `drawing, density` if pictures are drawn, and `film` if one is written."""
        numbers = (Column("found", "number"), Column("steps", "number"))
        files = ["scanpaths", *["drawing", "density"] * self._search.draws, *["film"] * self._search.films]
        return (Column("target", "text"), *numbers, *(Column(name, "text") for name in files))

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Samples, and writes a table an image."""
        return [self._row(image, batch, place) for image, place in zip(images, places, strict=True)]

    def describe(self, row: Row) -> str:
        """How long the searches are, how they end, and where they are."""
        file = row["drawing" if self._search.draws else "scanpaths"]
        return f"{row['steps']:.1f} fixations, {row['found']:.0%} found → {file}"

    def _row(self, image: torch.Tensor, batch: Batch, place: int) -> Row:
        paths = self._sampled(image)
        decoded, source = batch.decoded[place], batch.sources[place]
        assert decoded.width and decoded.height
        objects = self._grid.on((decoded.width, decoded.height))
        found: Row = {
            "target": self._search.target_name,
            "found": round(float(np.mean([path[-1] == self._target for path in paths])), 6),
            "steps": round(float(np.mean([len(path) for path in paths])), 6),
        }

        def write(base: str) -> Row:
            names = {"scanpaths": f"{base}.csv"}
            write_table(names["scanpaths"], encode_path(source.name), self._search.target_name, objects, paths)
            view = decoded.view
            if view is not None and self._search.draws:
                names |= {"drawing": f"{base}.scanpath.png", "density": f"{base}.density.png"}
                self._draw(names["drawing"], names["density"], view, paths)
            if view is not None and self._search.films:
                names["film"] = f"{base}.gif"
                on_view = self._on(view)
                write_film(
                    names["film"], view.picture, on_view, self._target, [on_view.centres[path] for path in paths]
                )
            return {column: encode_path(name) for column, name in names.items()}

        return found | self._folder.write(source, write, "scanpaths")

    def _sampled(self, image: torch.Tensor) -> list[np.ndarray]:
        """Objects of each scanpath, `[T]`; the same whatever other pictures there are."""
        crops = image.unflatten(1, (-1, self._size[0])).transpose(0, 1)  # [N, 3, H, W]
        objects = self._grid.on((self._grid.columns, self._grid.rows))
        with self.autocast():
            return sampled(self._model, objects, self._target, crops, self._search, self.compute.device)

    def _draw(self, drawing: str, density: str, view: View, paths: Sequence[np.ndarray]) -> None:
        """The first scanpath, and the density of all."""
        objects = self._on(view)
        left, upper, right, lower = objects.boxes[self._target].tolist()
        longer = max(64, *objects.size)
        points = [objects.centres[path] for path in paths]
        drawn = draw.draw_scanpaths(
            view.picture, points[0], target=(left, upper, right, lower), objects=objects, longer_side=longer
        )
        write_png(drawing, np.asarray(drawn))
        write_png(density, np.asarray(draw.draw_density(view.picture, points, longer_side=longer)))

    def _on(self, view: View) -> Objects:
        height, width = view.picture.shape[:2]
        return self._grid.on((width, height))


def sampled(
    model: OAT, objects: Objects, target: int, crops: torch.Tensor, search: Search, device: torch.device
) -> list[np.ndarray]:
    """Draws scanpaths over the objects of one picture.

    Args:
        model: Of scanpaths.
        objects: With cells.
        target: Which of them is searched for.
        crops: What they look like, `[N, 3, H, W]`.
        search: How often, how freely, and the seed.
        device: Where the model is.

    Returns:
        Objects of each scanpath, `[T]`.
    """
    scenes = Scenes.of_objects([objects], [target], [crops]).to(device)
    decoded = decoding.sample(
        model, scenes, search.samples, temperature=search.temperature, max_refixations=search.max_refixations,
        generator=torch.Generator(device).manual_seed(search.seed),
    )  # fmt: skip
    return decoded.tolist()[0]


def write_film(
    name: str,
    picture: Image.Image | np.ndarray,
    objects: Objects,
    target: int,
    paths: Sequence[np.ndarray],
    people: Sequence[np.ndarray] = (),
) -> None:
    """Writes the first few scanpaths one after another as a film, no more than keeps it small.

    Args:
        name: Of the file, .gif.
        picture: RGB.
        objects: Of the picture.
        target: Which of them was searched for.
        paths: Fixations of each scanpath in pixels, `[T, 2]`.
        people: Recorded scanpaths to show beside them, if any; these begin again where there are fewer.
    """
    shown: list[dict[str, np.ndarray]] = []
    for number, path in enumerate(paths[:_FILMED]):
        beside = number % max(1, len(people))
        one = {f"search {number + 1}": path}
        one |= {f"person {beside + 1}": person for person in people[beside : beside + 1]}
        if shown and sum(max(map(len, some.values())) for some in [*shown, one]) > _FRAMES:
            break
        shown.append(one)
    left, upper, right, lower = objects.boxes[target].tolist()
    side = max(64, min(_FILM_SIZE, 4 * max(map(int, objects.size))))
    draw.write_gif(name, picture, shown, target=(left, upper, right, lower), objects=objects, longer_side=side)


def write_table(name: str, image: str, target: str, objects: Objects, paths: Sequence[np.ndarray]) -> None:
    """Writes scanpaths as `vision.scanpath.datasets.read_csv` reads them, a row for each fixation, in pixels.

    Args:
        name: Of the file.
        image: Of the picture.
        target: Of what is searched for.
        objects: Of the picture.
        paths: Objects of each scanpath, `[T]`.
    """
    with open(name, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for number, path in enumerate(paths, 1):
            for time, (x, y) in enumerate(objects.centres[path].tolist()):
                writer.writerow([number, image, target, time, round(x, 2), round(y, 2)])
