"""Bodies that differ in one small part: pictures for fine-grained recognition, with the exact place of that part.

A body is a large shape of one of two colours, and wears one small mark. The class is what the mark is: its colour and
its shape (`CLASSES`). Marks of the same kinds lie loose on the ground beside the body and say nothing, so that looking
for a mark is not enough: it has to be the one on the body.

    sample = draw_sample(np.random.default_rng(0), label=3)
    drawn = pictures(seed=0, num=100)    # images [100, 3, 64, 64], labels [100], where part and loose marks are
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from recipes.scenes import SHAPES, Scene, SceneObject, draw, masks

__all__ = ["BODY_COLOURS", "CLASSES", "Parts", "draw_sample", "pictures"]

CLASSES = tuple(itertools.product(("red", "yellow", "green", "blue"), ("square", "cross")))
"""Colour and shape of the mark that a body of the class wears."""
BODY_COLOURS = ("cyan", "purple")

_BODIES, _MARKS = (0.5, 0.62), (0.13, 0.16)  # diameters, in fractions of the picture
_GROUNDS = (205, 240)  # grey levels
_GRID = 64  # places of marks are chosen on a grid this fine
_EDGE = 0.02  # between a body and the picture's edge


class Parts(NamedTuple):
    """Drawn pictures and what is known of them.

    Attributes:
        images: `[N, 3, H, W]`, RGB.
        labels: `[N]`, indices into `CLASSES`.
        parts: `[N, H, W]` in [0, 1], how much of each pixel shows the mark on the body.
        loose: `[N, H, W]` in [0, 1], how much shows a mark on the ground.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    parts: NDArray[np.float32]
    loose: NDArray[np.float32]


def draw_sample(rng: np.random.Generator, label: int | None = None, num_loose: int = 3) -> Scene:
    """Draws a body with its mark, and loose marks on the ground.

    Args:
        rng: Where chance comes from.
        label: Its class; any if None.
        num_loose: Marks on the ground, each of any class; for more than about 5 there is no room.

    Returns:
        The scene: body, mark, loose marks; no mark on the ground touches the body or another.

    Raises:
        ValueError: An unknown class.
    """
    label = int(rng.integers(len(CLASSES))) if label is None else label
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label={label}: expected an index into CLASSES, 0 to {len(CLASSES) - 1}.")
    colour, shape = CLASSES[label]
    while True:
        diameter = float(rng.uniform(*_BODIES))
        x, y = rng.uniform(diameter / 2 + _EDGE, 1 - diameter / 2 - _EDGE, 2)
        body = SceneObject(_any(rng, SHAPES), _any(rng, BODY_COLOURS), (float(x), float(y)), diameter)
        covered = masks(Scene((body,), 0), _GRID)[0]
        width = float(rng.uniform(*_MARKS))
        if (centre := _place(rng, covered > 0.99, width)) is None:
            continue
        objects = [body, SceneObject(shape, colour, centre, width)]
        free = covered < 0.01
        while len(objects) < 2 + num_loose and (centre := _place(rng, free, width := float(rng.uniform(*_MARKS)))):
            other = CLASSES[int(rng.integers(len(CLASSES)))]
            objects.append(SceneObject(other[1], other[0], centre, width))
            left, top, right, bottom = (round((c + s * width) * _GRID) for s in (-0.5, 0.5) for c in centre)
            free[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = False
        if len(objects) == 2 + num_loose:
            return Scene(tuple(objects), ground=int(rng.integers(*_GROUNDS, endpoint=True)))


def _any(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _place(rng: np.random.Generator, free: NDArray[np.bool_], diameter: float) -> tuple[float, float] | None:
    """Where a mark's box and a rim around it lie within `free` `[G, G]`: x and y of its centre, None if nowhere."""
    side = 2 * round(diameter * _GRID / 2) + 3
    padded = np.pad(free.astype(np.uint8), 1)  # OpenCV takes what is outside of a picture for free
    centres = np.argwhere(cv2.erode(padded, np.ones((side, side), np.uint8))[1:-1, 1:-1])
    if not len(centres):
        return None
    y, x = (centres[int(rng.integers(len(centres)))] + 0.5) / _GRID
    return float(x), float(y)


def pictures(seed: int, num: int, size: int = 64, num_loose: int = 3) -> Parts:
    """Draws pictures, each class equally often, in an order of chance.

    Args:
        seed: Of everything.
        num: N.
        size: Side in pixels.
        num_loose: Marks on the ground of each.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % len(CLASSES))
    images = np.empty((num, 3, size, size), np.uint8)
    parts, loose = np.empty((2, num, size, size), np.float32)
    for n, label in enumerate(labels):
        scene = draw_sample(rng, int(label), num_loose)
        coarse = rng.uniform(-24, 0, (5, 5)).astype(np.float32)  # light and shade on the ground
        shade = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
        images[n] = draw(scene, size, shade).transpose(2, 0, 1)
        shown = masks(scene, size)
        parts[n], loose[n] = shown[1], shown[2:].sum(0)
    return Parts(images, labels, parts, loose)
