"""A world to search in: grids of coloured, striped shapes, and a searcher whose every step has a known probability.

What a model of scanpaths can reach at best is known here exactly: no model can expect fewer nats per token than the
searcher itself. Scenes come in batches, as arrays; crops are rendered from them, and a model is to be shown nothing but
the crops. The world is ours, made so that lengths and habits are about those of people on a collage of book covers.

    scenes = sample_scenes(np.random.default_rng(0), 10, rows=3, columns=9)
    paths = Searcher().search(rng, scenes, each=4)         # [10, 4, T], padded with PAD
    crops = render(scenes)                                 # [10 * 27, 3, 36, 24]
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vision.scanpath.objects import Objects, RegularGrid
from vision.scanpath.scenes import PAD, Scenes

__all__ = [
    "CROP_SIZE",
    "SHAPES",
    "SearchScenes",
    "Searcher",
    "Walk",
    "grid_distances",
    "objects",
    "picture",
    "render",
    "sample_scenes",
    "to_model",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CROP_SIZE = (36, 24)
"""Height and width of the crops, in pixels."""
SHAPES = ("disc", "square", "triangle", "diamond", "cross")

_PROTOTYPES = 12  # kinds of objects in a scene
_ODD_SHAPES = 0.15  # share of the objects whose shape is not that of their kind
_NOISE = {"hue": 0.35, "lightness": 0.08, "angle": 0.3, "frequency": 0.1}  # standard deviations within a kind
_LIGHTNESS = (0.3, 0.7)  # of kinds
_CHROMA, _CONTRAST, _GROUND = 0.24, 0.12, 0.5  # of colours, of stripes; grey level behind a shape
_CYCLES = (1.0, 4.0)  # stripes across a crop's width, at frequency 0 and 1


@dataclass(frozen=True, eq=False)
class SearchScenes:
    """A batch of scenes of one grid, what is in them, and what is searched for.

    Attributes:
        rows: of the grid.
        columns: of the grid.
        hue: `[B, N]`, in radians; N is rows times columns, row by row.
        lightness: `[B, N]`, about 0 to 1.
        shape: `[B, N]`, int64, index into `SHAPES`.
        angle: `[B, N]`, of the stripes, in radians.
        frequency: `[B, N]`, of the stripes, about 0 to 1.
        targets: `[B]`, int64, the object that is searched for.
    """

    rows: int
    columns: int
    hue: Floats
    lightness: Floats
    shape: Integers
    angle: Floats
    frequency: Floats
    targets: Integers

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def features(self) -> Floats:
        """How things look to the searcher, `[B, N, 11]`; distances between them are those that it goes by."""
        parts = (
            np.stack((np.cos(self.hue), np.sin(self.hue), self.lightness), -1),
            0.7 * np.eye(len(SHAPES))[self.shape],
            0.5 * np.stack((np.cos(2 * self.angle), np.sin(2 * self.angle)), -1),
            0.6 * self.frequency[..., None],
        )
        return np.concatenate(parts, -1)

    def select(self, index: slice | Integers) -> SearchScenes:
        """Some of the scenes."""
        arrays = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in ("rows", "columns")}
        return SearchScenes(self.rows, self.columns, **arrays)

    def with_targets(self, targets: Integers) -> SearchScenes:
        """Each of the scenes K times in a row, searched for other targets, `[B, K]`."""
        several = self.select(np.arange(len(self)).repeat(targets.shape[1]))
        return replace(several, targets=targets.ravel())


def sample_scenes(rng: np.random.Generator, num: int, rows: int = 3, columns: int = 9) -> SearchScenes:
    """Draws scenes: each has kinds of objects of its own, and of each kind several that are not quite alike.

    Args:
        rng: where randomness comes from.
        num: B.
        rows: of the grid.
        columns: of the grid.
    """
    count = rows * columns
    kinds = {
        "hue": rng.uniform(0, 2 * np.pi, (num, _PROTOTYPES)),
        "lightness": rng.uniform(*_LIGHTNESS, (num, _PROTOTYPES)),
        "angle": rng.uniform(0, np.pi, (num, _PROTOTYPES)),
        "frequency": rng.uniform(0, 1, (num, _PROTOTYPES)),
    }
    kind_shapes = rng.integers(len(SHAPES), size=(num, _PROTOTYPES))
    kind = rng.integers(_PROTOTYPES, size=(num, count))
    drawn = {
        name: np.take_along_axis(values, kind, 1) + rng.normal(0, _NOISE[name], (num, count))
        for name, values in kinds.items()
    }
    shape = np.take_along_axis(kind_shapes, kind, 1)
    odd = rng.random((num, count)) < _ODD_SHAPES
    shape = np.where(odd, rng.integers(len(SHAPES), size=(num, count)), shape)
    return SearchScenes(rows, columns, **drawn, shape=shape, targets=rng.integers(count, size=num))


def grid_distances(rows: int, columns: int) -> Floats:
    """Between the cells of a grid, `[N, N]`, in cells."""
    cells = np.stack(np.divmod(np.arange(rows * columns), columns), 1).astype(float)
    return np.linalg.norm(cells[:, None] - cells, axis=-1)


@dataclass(frozen=True)
class Searcher:
    """Somebody who searches: near things, things that look like the target, and things not looked at lately first.

    Of an object o that is d cells from the one that is fixated, the utility is
    `beta s / (1 + (d / e0)²) - cost d - ior m`, with s its likeness to the target and m its memory, `decay` to the
    power of the steps since it was last fixated, 0 if it never was. Of staying it is `stay - cost`, on the target
    `stay_on_target` more. The next fixation follows the softmax of these; before each step the search may `stop`.

    Attributes:
        beta: weight of likeness to the target.
        e0: distance at which likeness counts half, in cells.
        cost: of a step, for each cell.
        ior: inhibition of return.
        decay: of the memory of a fixation, for each step.
        stay: utility of staying.
        stay_on_target: what the target adds to that.
        tau: how unlike things may be and still seem alike, in units of `SearchScenes.features`.
        stop: probability of the end on the target, and elsewhere.
        spread: standard deviation of the first fixation around half a row above the middle, vertical and horizontal.
        max_length: fixations after which the search ends in any case.
    """

    beta: float = 7.5
    e0: float = 5.5
    cost: float = 0.62
    ior: float = 4.3
    decay: float = 0.95
    stay: float = 2.75
    stay_on_target: float = 1.3
    tau: float = 0.7
    stop: tuple[float, float] = (0.36, 0.004)
    spread: tuple[float, float] = (1.3, 1.7)
    max_length: int = 100

    def likeness(self, scenes: SearchScenes) -> Floats:
        """Of each object to the target, `[B, N]`, from 0 to 1: `exp(-|f_o - f_t|² / (2 tau²))`."""
        features = scenes.features
        difference = features - features[np.arange(len(scenes)), scenes.targets][:, None]
        return np.exp(-np.square(difference).sum(-1) / (2 * self.tau**2))

    def search(self, rng: np.random.Generator, scenes: SearchScenes, each: int = 1) -> Integers:
        """Searches.

        Args:
            rng: where randomness comes from.
            scenes: B of them.
            each: S, searches of each scene.

        Returns:
            Objects, `[B, S, T]`, padded with `PAD`; T is the longest one's length.
        """
        walk = Walk(self, scenes, np.repeat(np.arange(len(scenes)), each))
        end, steps = scenes.rows * scenes.columns, []
        while not walk.ended.all():
            chances = np.exp(walk.log_probs()).cumsum(-1)
            drawn = (chances < rng.random((len(chances), 1)) * chances[:, -1:]).sum(-1)
            drawn = np.where(walk.ended, end, drawn)
            walk.move(drawn)
            steps.append(np.where(walk.ended, PAD, drawn))
        paths = np.stack(steps[:-1] or steps, -1)  # [P, T]; the last step was nothing but ends
        return paths.reshape(len(scenes), each, -1)

    def log_probs(self, scenes: SearchScenes, paths: Integers, scene_of: Integers | None = None) -> Floats:
        """The searcher's own probabilities of what comes after each of the fixations that came.

        Args:
            scenes: B of them.
            paths: `[P, T]`, padded with `PAD`.
            scene_of: which scene each is of, `[P]`; None where there is one for each.

        Returns:
            Natural logarithms `[P, T + 1, N + 1]`, rows and columns as of `vision.scanpath.model.OAT.forward`. Rows
            behind the end of a scanpath mean nothing.
        """
        walk = Walk(self, scenes, np.arange(len(paths)) if scene_of is None else scene_of)
        end, rows = scenes.rows * scenes.columns, [walk.log_probs()]
        for step in paths.T:
            walk.move(np.where(step == PAD, end, step))
            rows.append(walk.log_probs())
        return np.stack(rows, 1)


class Walk:
    """Searches under way, one step of all at a time.

    Args:
        searcher: who searches.
        scenes: B of them.
        scene_of: which scene each of the P searches is of, `[P]`.
    """

    def __init__(self, searcher: Searcher, scenes: SearchScenes, scene_of: Integers) -> None:
        self._searcher, self._every = searcher, np.arange(len(scene_of))
        self._distances = grid_distances(scenes.rows, scenes.columns)
        self._likeness = searcher.likeness(scenes)[scene_of]
        self._targets = scenes.targets[scene_of]
        self._first = _first_fixation(searcher, scenes.rows, scenes.columns)
        self._at: Integers | None = None
        self._steps = 0
        self._memory = np.zeros(self._likeness.shape)
        self.ended = np.zeros(len(scene_of), bool)
        """Which have ended, `[P]`."""

    def log_probs(self) -> Floats:
        """Of what comes next, `[P, N + 1]`: column n for object n, the last one for the end."""
        if self._at is None:
            first = np.broadcast_to(self._first, self._likeness.shape)
            return np.pad(first, ((0, 0), (0, 1)), constant_values=-np.inf)
        s, every, at = self._searcher, self._every, self._at
        on_target = at == self._targets
        distance = self._distances[at]  # [P, N]
        utility = s.beta * self._likeness / (1 + (distance / s.e0) ** 2) - s.cost * distance - s.ior * self._memory
        utility[every, at] = s.stay - s.cost + s.stay_on_target * on_target
        stop = np.where(on_target, *s.stop) if self._steps < s.max_length else np.ones(len(at))
        with np.errstate(divide="ignore"):
            return np.column_stack((_log_softmax(utility) + np.log(1 - stop)[:, None], np.log(stop)))

    def move(self, following: Integers) -> None:
        """Goes on to objects, `[P]`; N ends a search."""
        self.ended = self.ended | (following == self._likeness.shape[1])
        at = np.minimum(following, self._likeness.shape[1] - 1)
        if self._at is not None:
            self._memory[self._every, self._at] = 1.0  # fixated a step ago once time has gone on
        self._memory *= self._searcher.decay
        self._at, self._steps = at, self._steps + 1


def _first_fixation(searcher: Searcher, rows: int, columns: int) -> Floats:
    """Logarithms of where a search begins, `[N]`."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    vertical = (row - ((rows - 1) / 2 - 0.5)) / searcher.spread[0]
    horizontal = (column - (columns - 1) / 2) / searcher.spread[1]
    return _log_softmax(-(vertical**2 + horizontal**2) / 2)


def _log_softmax(x: Floats) -> Floats:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def render(scenes: SearchScenes, size: tuple[int, int] = CROP_SIZE) -> Tensor:
    """Draws the objects: each shape in its colour, with stripes that are lighter and darker, on grey.

    Args:
        scenes: B of them.
        size: height and width of a crop.

    Returns:
        `[B * N, 3, H, W]`, float32, RGB from 0 to 1 in steps of 1/255.
    """
    cover = torch.from_numpy(_masks(*size))[scenes.shape.ravel()][:, None]  # [M, 1, H, W]
    hue, lightness, angle, frequency = (
        torch.from_numpy(values.ravel()).float()[:, None, None]
        for values in (scenes.hue, scenes.lightness, scenes.angle, scenes.frequency)
    )
    y, x = _plane(*size)
    y, x = torch.from_numpy(y).float(), torch.from_numpy(x).float()
    cycles = _CYCLES[0] + (_CYCLES[1] - _CYCLES[0]) * frequency
    stripes = _CONTRAST * torch.sin(2 * torch.pi * cycles * (x * angle.cos() + y * angle.sin()))  # [M, H, W]
    phases = torch.tensor([0.0, 2 * torch.pi / 3, 4 * torch.pi / 3])[:, None, None]
    colour = (lightness + stripes)[:, None] + _CHROMA * torch.cos(hue[:, None] - phases)  # [M, 3, H, W]
    return (torch.lerp(torch.tensor(_GROUND), colour.clamp(0, 1), cover) * 255).round() / 255


def _plane(height: int, width: int) -> tuple[Floats, Floats]:
    """y and x of pixels' centres, `[H, W]`, in widths of a crop from its middle."""
    y, x = np.mgrid[:height, :width]
    return (y + 0.5 - height / 2) / width, (x + 0.5 - width / 2) / width


@cache
def _masks(height: int, width: int) -> NDArray[np.float32]:
    """How much of each pixel each shape covers, `[S, H, W]`; shapes are of about the same area."""
    fine = 8  # pixels are drawn so much finer, then averaged
    y, x = _plane(height * fine, width * fine)
    inside = {
        "disc": np.hypot(x, y) < 0.4,
        "square": np.maximum(abs(x), abs(y)) < 0.355,
        "triangle": (y < 0.36) & (y > 2 * abs(x) * 0.87 - 0.46),
        "diamond": abs(x) / 0.42 + abs(y) / 0.6 < 1,
        "cross": (np.minimum(abs(x), abs(y)) < 0.16) & (np.maximum(abs(x), abs(y)) < 0.46),
    }
    drawn = np.stack([inside[shape] for shape in SHAPES]).astype(np.float32)
    return drawn.reshape(len(SHAPES), height, fine, width, fine).mean((2, 4))


def objects(rows: int, columns: int) -> Objects:
    """The objects of `picture`: cells that fill it, each as large as a crop."""
    height, width = CROP_SIZE
    return RegularGrid(rows, columns).on((columns * width, rows * height))


def picture(scenes: SearchScenes, index: int = 0) -> Image.Image:
    """One of the scenes as a picture, crop beside crop."""
    rows, columns = scenes.rows, scenes.columns
    crops = render(scenes.select(slice(index, index + 1))).unflatten(0, (rows, columns))  # [R, C, 3, H, W]
    pixels = crops.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [R H, C W, 3]
    return Image.fromarray((pixels * 255).round().byte().numpy())


def to_model(scenes: SearchScenes, looks: Tensor | None = None) -> Scenes:
    """The scenes as a model takes them.

    Args:
        scenes: B of them.
        looks: of `render`, or other looks of the `B * N` objects; of fewer, where each scene comes several times in a
            row with other targets, its looks once; None for a model that looks at nothing.
    """
    cells = torch.from_numpy(np.stack(np.divmod(np.arange(scenes.rows * scenes.columns), scenes.columns), 1)).float()
    positions = cells.expand(len(scenes), -1, -1)
    counts = torch.full((len(scenes),), len(cells))
    shared = 1 if looks is None else len(scenes) * len(cells) // len(looks)
    look_of = None
    if shared > 1 and looks is not None:
        look_of = torch.arange(len(looks)).view(-1, len(cells)).repeat_interleave(shared, 0).flatten()
    return Scenes(positions, torch.from_numpy(scenes.targets), counts, looks, look_of)
