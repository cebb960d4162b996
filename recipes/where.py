"""Which way from one object to another: drawn scenes whose class is where something lies, not what is there.

Every scene holds one red circle, one blue square, and other objects that share a colour or a shape with these. The
class is the direction from the circle to the square, one of 16 that fill the turn. What is to be seen is the same for
all classes: they differ in places alone.

    scene = sample(np.random.default_rng(0))
    direction(scene)                              # 0 is right, 4 is below, 8 is left, 12 is above
    images, labels = pictures(seed=0, num=100)    # [100, 3, 48, 48] uint8, [100]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject, draw

__all__ = ["DIRECTIONS", "FROM", "TO", "direction", "pictures", "sample"]

DIRECTIONS = 16
"""How many there are; number 0 is right, 4 is below, 8 is left, 12 is above, and the others lie between."""
FROM, TO = ("red", "circle"), ("blue", "square")
"""Colour and shape of the object that the direction starts from, and of that where it ends."""

_OTHERS = [
    (colour, shape)
    for colour in COLOURS
    for shape in SHAPES
    if (colour, shape) not in (FROM, TO) and (colour in (FROM[0], TO[0]) or shape in (FROM[1], TO[1]))
]

_TURN = 2 * np.pi / DIRECTIONS
_DIAMETERS = (0.14, 0.19)  # in fractions of the picture
_EDGE, _GAP = 0.02, 0.02  # between an object's box and the picture's edge, and between two boxes
_DISTANCES = (0.25, 0.6)  # from circle to square
_GROUNDS = (205, 240)  # grey levels
_TRIES = 40  # to find room for all other objects, before the two are placed anew


def direction(scene: Scene) -> int:
    """The class of a scene: the direction from its first object to its second."""
    (x0, y0), (x1, y1) = (item.centre for item in scene.objects[:2])
    return round(np.arctan2(y1 - y0, x1 - x0) / _TURN) % DIRECTIONS


def sample(rng: np.random.Generator, label: int | None = None, num_others: int = 5) -> Scene:
    """Draws a scene.

    Args:
        rng: Where chance comes from.
        label: Its class; any if None.
        num_others: Objects besides the two that matter; for more than about 8 there is no room.

    Returns:
        The scene: circle, square, and the others.
    """
    label = int(rng.integers(DIRECTIONS)) if label is None else label
    while True:
        diameters = rng.uniform(*_DIAMETERS, 2 + num_others)
        margins = diameters / 2 + _EDGE
        angle = (label + rng.uniform(-0.5, 0.5)) * _TURN
        start = rng.uniform(margins[0], 1 - margins[0], 2)
        end = start + rng.uniform(*_DISTANCES) * np.array([np.cos(angle), np.sin(angle)])
        if (end < margins[1]).any() or (end > 1 - margins[1]).any():
            continue
        centres = [start, end]
        for _ in range(_TRIES):
            n = len(centres)
            if n == len(diameters):
                break
            centre = rng.uniform(margins[n], 1 - margins[n], 2)
            apart = np.abs(np.array(centres) - centre).max(1) - (diameters[:n] + diameters[n]) / 2
            if (apart >= _GAP).all():
                centres.append(centre)
        if len(centres) == len(diameters):
            break
    kinds = [FROM, TO, *(_OTHERS[int(n)] for n in rng.integers(len(_OTHERS), size=num_others))]
    objects = tuple(
        SceneObject(shape, colour, (float(x), float(y)), float(diameter))
        for (colour, shape), (x, y), diameter in zip(kinds, centres, diameters, strict=True)
    )
    return Scene(objects, ground=int(rng.integers(*_GROUNDS, endpoint=True)))


def pictures(seed: int, num: int, size: int = 48) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws pictures, each class equally often, in an order of chance.

    Args:
        seed: Of everything.
        num: N.
        size: Side in pixels.

    Returns:
        `[N, 3, size, size]`, RGB, and the classes, `[N]`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % DIRECTIONS)
    drawn = np.stack([draw(sample(rng, int(label)), size) for label in labels])
    return np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)), labels
