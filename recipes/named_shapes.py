"""One coloured shape on a striped and spotted ground: pictures whose class is colour and shape, `red circle`.

images, labels = pictures(seed=0, num=100)    # [100, 3, 64, 64] uint8, [100] as indices into NAMES
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject, draw
from recipes.textured import texture

__all__ = ["DIAMETERS", "NAMES", "pictures", "sample"]

NAMES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The classes, in the order of their indices."""


DIAMETERS = (0.4, 0.9)
"""Of the object, in fractions of the picture, where nothing else is asked for."""

_EDGE = 0.03  # between the object's box and the picture's edge
_GROUNDS = (90, 200)  # grey levels


def sample(rng: np.random.Generator, label: int | None = None, diameters: tuple[float, float] = DIAMETERS) -> Scene:
    """Draws a scene of one object, anywhere in it.

    Args:
        rng: Where chance comes from.
        label: The object as an index into `NAMES`; any if None.
        diameters: The smallest and the largest, in fractions of the picture.

    Raises:
        ValueError: An unknown object, or one that has no room.
    """
    label = int(rng.integers(len(NAMES))) if label is None else label
    if not 0 <= label < len(NAMES):
        raise ValueError(f"label={label}: expected an index into NAMES, 0 to {len(NAMES) - 1}.")
    if not 0 < diameters[0] <= diameters[1] <= 1 - 2 * _EDGE:
        raise ValueError(f"diameters={diameters}: expected two that rise, above 0 and up to {1 - 2 * _EDGE:g}.")
    diameter = float(rng.uniform(*diameters))
    x, y = rng.uniform(diameter / 2 + _EDGE, 1 - diameter / 2 - _EDGE, 2)
    colour, shape = NAMES[label].split()
    return Scene((SceneObject(shape, colour, (float(x), float(y)), diameter),), int(rng.integers(*_GROUNDS)))


def pictures(
    seed: int, num: int, size: int = 64, diameters: tuple[float, float] = DIAMETERS
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws pictures, each class equally often, in an order of chance.

    Args:
        seed: Of everything.
        num: N; below 36 only the first classes are shown.
        size: Side in pixels.
        diameters: See `sample`.

    Returns:
        `[N, 3, size, size]`, RGB, and the classes, `[N]`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % len(NAMES))
    drawn = np.stack([draw(sample(rng, int(label), diameters), size, texture(rng, size)) for label in labels])
    return np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)), labels
