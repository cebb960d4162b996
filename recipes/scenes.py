"""A world of coloured shapes on a plain ground: drawn with its exact ground truth, and read back from a picture.

    python -m recipes.scenes            # how often the detector is wrong about drawn pictures

A `Scene` is a description without pixels, in fractions of the picture, so that one scene can be drawn at any size.
`draw`, `masks` and `boxes` say what is to be seen and where; `detect` looks at nothing but the picture.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = [
    "COLOURS",
    "SHAPES",
    "DetectorErrors",
    "Found",
    "Scene",
    "SceneObject",
    "boxes",
    "caption",
    "detect",
    "detector_errors",
    "draw",
    "masks",
    "sample_scene",
    "shows",
]

# sRGB; the hues are at least 40° apart, which is what the detector goes by
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "yellow": (235, 195, 30),
    "green": (45, 165, 70),
    "cyan": (45, 185, 200),
    "blue": (45, 80, 210),
    "purple": (165, 55, 185),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "heart")

_SUPERSAMPLING = 8  # edges are drawn this much finer, then averaged
_DIAMETERS = (0.34, 0.44)  # of what `sample_scene` places, in fractions of the shorter side
_GAP = 0.04  # between the boxes of two objects, and between a box and the picture's edge
_GROUNDS = (205, 240)  # grey levels

# What the detector takes for an object: saturation and value of its pixels, its area as a fraction of the picture, the
# ratio of its sides, and the intersection over union with the best-fitting shape.
_MIN_SATURATION, _MIN_VALUE, _MIN_AREA, _MAX_ASPECT, _MIN_SCORE = 0.35, 0.2, 0.012, 1.6, 0.6


@dataclass(frozen=True)
class SceneObject:
    """One shape of one colour.

    Attributes:
        shape: One of `SHAPES`.
        colour: A key of `COLOURS`.
        centre: x and y of its box's centre, in fractions of the picture's width and height.
        diameter: Side of its box, in fractions of the picture's shorter side.

    Raises:
        ValueError: The shape or the colour is unknown.
    """

    shape: str
    colour: str
    centre: tuple[float, float]
    diameter: float

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: expected one of {', '.join(SHAPES)}.")
        if self.colour not in COLOURS:
            raise ValueError(f"colour={self.colour!r}: expected one of {', '.join(COLOURS)}.")

    @property
    def name(self) -> str:
        """Colour and noun: `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a plain ground; a later object covers an earlier one.

    Attributes:
        objects: In the order in which they are named.
        ground: Grey level from 0 to 255.
    """

    objects: tuple[SceneObject, ...]
    ground: int


@dataclass(frozen=True)
class Found:
    """An object that `detect` found in a picture.

    Attributes:
        name: Colour and noun: `red circle`.
        box: `xyxy` in pixels.
        score: Intersection over union with the ideal shape in that box, from 0 to 1.
    """

    name: str
    box: tuple[int, int, int, int]
    score: float


def _outline(shape: str) -> np.ndarray:
    """The corners of a shape, `[P, 2]` as x and y, stretched to fill the box from -0.5 to 0.5."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    if shape == "circle":
        x, y = np.sin(turn), -np.cos(turn)
    elif shape == "square":
        x, y = np.array([-1, 1, 1, -1]), np.array([-1, -1, 1, 1])
    elif shape == "triangle":
        x, y = np.array([-1, 0, 1]), np.array([1, -1, 1])
    elif shape == "diamond":
        x, y = np.array([0, 1, 0, -1]), np.array([-1, 0, 1, 0])
    elif shape == "cross":
        x = np.array([-1, 1, 1, 3, 3, 1, 1, -1, -1, -3, -3, -1])
        y = np.array([-3, -3, -1, -1, 1, 1, 3, 3, 1, 1, -1, -1])
    else:  # heart
        x = 16 * np.sin(turn) ** 3
        y = -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
    corners = np.stack([x, y], axis=1).astype(np.float64)
    low, high = corners.min(0), corners.max(0)
    return (corners - low) / (high - low) - 0.5


_OUTLINES = {shape: _outline(shape) for shape in SHAPES}


def _coverage(shape: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel a shape in `box` (`xyxy`, pixels) covers: `[H, W]` in [0, 1]."""
    left, top, right, bottom = box
    corners = _OUTLINES[shape] * (right - left, bottom - top) + ((left + right) / 2, (top + bottom) / 2)
    fine = np.zeros((size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING), np.uint8)
    # OpenCV counts from the middle of the first pixel, and takes fractions of a pixel in the last four bits.
    points = np.rint((corners * _SUPERSAMPLING - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(fine, [points], 255, shift=4)
    return cv2.resize(fine, (size[1], size[0]), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def boxes(scene: Scene, size: int | tuple[int, int]) -> np.ndarray:
    """Where the objects are.

    Args:
        scene: K objects.
        size: Side of the picture in pixels, or its height and width.

    Returns:
        `[K, 4]` float, `xyxy` in pixels.
    """
    height, width = _size(size)
    centres = np.array([o.centre for o in scene.objects], float).reshape(-1, 2) * (width, height)
    half = np.array([o.diameter for o in scene.objects], float).reshape(-1, 1) * min(height, width) / 2
    return np.concatenate([centres - half, centres + half], axis=1)


def masks(scene: Scene, size: int | tuple[int, int]) -> np.ndarray:
    """How much of each pixel shows each object; what a later object covers does not count.

    Args:
        scene: K objects.
        size: Side of the picture in pixels, or its height and width.

    Returns:
        `[K, H, W]` float32 in [0, 1]; above 0.5 the pixel is the object's.
    """
    height, width = _size(size)
    found = np.zeros((len(scene.objects), height, width), np.float32)
    for k, (item, box) in enumerate(zip(scene.objects, boxes(scene, size), strict=True)):
        coverage = _coverage(item.shape, tuple(box), (height, width))
        found[:k] *= 1 - coverage
        found[k] = coverage
    return found


def draw(scene: Scene, size: int | tuple[int, int], texture: np.ndarray | float = 0) -> np.ndarray:
    """Draws a scene with smooth edges.

    Args:
        scene: What to draw.
        size: Side of the picture in pixels, or its height and width.
        texture: `[H, W]`, added to the ground's grey level where the ground shows.

    Returns:
        `[H, W, 3]` uint8, RGB.
    """
    shares = masks(scene, size)
    colours = np.array([COLOURS[o.colour] for o in scene.objects], np.float32).reshape(-1, 3)
    ground = (1 - shares.sum(0)) * (scene.ground + texture)
    picture = np.einsum("khw,kc->hwc", shares, colours) + ground[..., None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def caption(names: Sequence[str]) -> str:
    """`["red circle", "blue square"]` → `"a red circle and a blue square"`."""
    return " and ".join(f"a {name}" for name in names)


def sample_scene(rng: np.random.Generator, names: Sequence[str]) -> Scene:
    """Places objects at random, apart from one another.

    Args:
        rng: Where chance comes from.
        names: Colour and noun of each object; one or two find room at once, three after a while, more may not.

    Returns:
        The scene, its objects in the order of `names`.
    """
    while True:
        diameters = rng.uniform(*_DIAMETERS, len(names))
        margins = diameters / 2 + _GAP
        centres = rng.uniform(margins[:, None], 1 - margins[:, None], (len(names), 2))
        pairs = itertools.combinations(range(len(names)), 2)
        if all(np.abs(centres[i] - centres[j]).max() >= (diameters[i] + diameters[j]) / 2 + _GAP for i, j in pairs):
            break
    objects = tuple(
        SceneObject(shape, colour, (float(x), float(y)), float(diameter))
        for (colour, shape), (x, y), diameter in zip(map(str.split, names), centres, diameters, strict=True)
    )
    return Scene(objects, ground=int(rng.integers(*_GROUNDS, endpoint=True)))


def _colour_of_pixels(picture: np.ndarray) -> np.ndarray:
    """`[H, W, 3]` uint8 → `[H, W]` index into `COLOURS`, -1 where a pixel is too grey or too dark to have a colour."""
    hue, saturation, value = cv2.split(cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV))
    palette = np.array(list(COLOURS.values()), np.float32)[None] / 255
    hues = cv2.cvtColor(palette, cv2.COLOR_RGB2HSV)[0, :, 0]  # degrees
    distance = np.abs((hue[..., None] - hues + 180) % 360 - 180)
    return np.where((saturation >= _MIN_SATURATION) & (value >= _MIN_VALUE), distance.argmin(-1), -1)


def _softness(picture: np.ndarray, colours: np.ndarray, index: int) -> np.ndarray:
    """How far each pixel is on the way from the ground to a colour: `[H, W]` in [0, 1], 0 on objects of others."""
    plain = colours < 0
    ground = np.median(picture[plain], axis=0) if plain.any() else np.full(3, 255.0)
    way = np.array(list(COLOURS.values())[index]) - ground
    share = np.clip((picture - ground) @ way / (way @ way), 0, 1)
    return np.where(plain | (colours == index), share, 0)


@functools.lru_cache(maxsize=2048)
def _ideal(shape: str, width: int, height: int, more: float) -> np.ndarray:
    """A shape in a box with a rim of one pixel, reaching `more` pixels into the rim: `[height + 2, width + 2]`."""
    box = (1 - more, 1 - more, width + 1 + more, height + 1 + more)
    return _coverage(shape, box, (height + 2, width + 2))


def _best_shape(share: np.ndarray) -> tuple[str, float]:
    """The shape that fits a region with a rim of one pixel best, and its (soft) intersection over union with it.

    A soft edge makes pointed shapes look smaller than they are, so sizes up to a pixel larger are tried too.
    """
    height, width = share.shape[0] - 2, share.shape[1] - 2
    ious = {}
    for shape, more in itertools.product(SHAPES, (0.0, 0.5, 1.0)):
        ideal = _ideal(shape, width, height, more)
        ious[shape, more] = float(np.minimum(share, ideal).sum() / np.maximum(share, ideal).sum())
    best = max(ious, key=ious.__getitem__)
    return best[0], ious[best]


def _regions(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Connected parts of a mask `[H, W]`, sized as objects are: left, top, width, height."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return [
        (left, top, width, height)
        for left, top, width, height, area in stats[1:].tolist()
        if area >= _MIN_AREA * mask.size and max(width, height) <= _MAX_ASPECT * min(width, height)
    ]


def detect(picture: np.ndarray) -> list[Found]:
    """Reads a picture back: connected regions of one colour, and the shape each looks most like.

    Args:
        picture: `[H, W, 3]` uint8, RGB; drawn, decoded or generated.

    Returns:
        What was found, largest score first. A region that resembles no shape is not an object.

    Raises:
        ValueError: The picture is not an RGB array of bytes.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture is {picture.dtype} {picture.shape}: expected uint8 [H, W, 3], such as from draw().")
    colours = _colour_of_pixels(picture)
    found = []
    for index, colour in enumerate(COLOURS):
        if not (regions := _regions(colours == index)):
            continue
        share = np.pad(_softness(picture, colours, index), 1)
        for left, top, width, height in regions:
            shape, score = _best_shape(share[top : top + height + 2, left : left + width + 2])
            if score >= _MIN_SCORE:
                found.append(Found(f"{colour} {shape}", (left, top, left + width, top + height), score))
    return sorted(found, key=lambda f: -f.score)


def shows(picture: np.ndarray, names: Sequence[str]) -> bool:
    """Whether every one of the named objects is found in a picture `[H, W, 3]`, uint8."""
    return set(names) <= {found.name for found in detect(picture)}


@dataclass(frozen=True)
class DetectorErrors:
    """How often the detector was wrong.

    Attributes:
        objects: Objects that were drawn.
        misses: Of these, not found, or not under their name.
        false_alarms: Found, but not drawn.
    """

    objects: int
    misses: int
    false_alarms: int


def detector_errors(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> DetectorErrors:
    """Compares what is found in pictures with what they show.

    Args:
        pictures: One for each scene: drawn, or drawn and then encoded and decoded.
        scenes: The truth.

    Returns:
        The counts over all pictures.
    """
    misses = false_alarms = 0
    for picture, scene in zip(pictures, scenes, strict=True):
        found = [f.name for f in detect(picture)]
        drawn = [o.name for o in scene.objects]
        misses += sum(max(drawn.count(name) - found.count(name), 0) for name in set(drawn))
        false_alarms += sum(max(found.count(name) - drawn.count(name), 0) for name in set(found))
    return DetectorErrors(sum(len(s.objects) for s in scenes), misses, false_alarms)


def main() -> None:
    """Prints the detector's errors on scenes of one and two objects of every colour and shape."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--num", type=int, default=1000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    scenes = [sample_scene(rng, list(rng.choice(names, 1 + n % 2))) for n in range(args.num)]
    errors = detector_errors([draw(s, args.size) for s in scenes], scenes)
    print(f"{args.num} pictures, {errors.objects} objects: {errors.misses} missed, {errors.false_alarms} false alarms")


if __name__ == "__main__":
    main()
