"""One coloured shape on a striped and spotted ground: pictures whose class is the shape, to be corrupted afterwards.

images, labels = pictures(seed=0, num=100)    # [100, 3, 64, 64] uint8, [100] as indices into recipes.scenes.SHAPES
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject, draw

__all__ = ["pictures", "sample", "texture"]

_DIAMETERS = (0.35, 0.55)  # in fractions of the picture
_EDGE = 0.03  # between the shape's box and the picture's edge
_GROUNDS = (90, 200)  # grey levels
_STRIPES = (15.0, 45.0)  # grey levels from a stripe's middle to the ground's mean
_WAVES = (2.0, 8.0)  # stripes across the picture
_SPOTS = 40.0  # grey levels, at most


def texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Stripes in one direction and soft spots, `[size, size]`, in grey levels around 0."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    along = x * np.cos(angle) + y * np.sin(angle)
    stripes = rng.uniform(*_STRIPES) * np.sin(2 * np.pi * rng.uniform(*_WAVES) * along + phase)
    coarse = rng.uniform(-_SPOTS, _SPOTS, (int(rng.integers(4, 12)),) * 2).astype(np.float32)
    spots = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return (stripes + spots).astype(np.float32)


def sample(rng: np.random.Generator, label: int | None = None) -> Scene:
    """Draws a scene of one shape, in any colour and place.

    Args:
        rng: Where chance comes from.
        label: The shape as an index into `SHAPES`; any if None.

    Raises:
        ValueError: An unknown shape.
    """
    label = int(rng.integers(len(SHAPES))) if label is None else label
    if not 0 <= label < len(SHAPES):
        raise ValueError(f"label={label}: expected an index into SHAPES, 0 to {len(SHAPES) - 1}.")
    diameter = float(rng.uniform(*_DIAMETERS))
    x, y = rng.uniform(diameter / 2 + _EDGE, 1 - diameter / 2 - _EDGE, 2)
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    shape = SceneObject(SHAPES[label], colour, (float(x), float(y)), diameter)
    return Scene((shape,), ground=int(rng.integers(*_GROUNDS, endpoint=True)))


def pictures(seed: int, num: int, size: int = 64) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws pictures, each class equally often, in an order of chance.

    Args:
        seed: Of everything.
        num: N.
        size: Side in pixels.

    Returns:
        `[N, 3, size, size]`, RGB, and the classes, `[N]`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % len(SHAPES))
    drawn = np.stack([draw(sample(rng, int(label)), size, texture(rng, size)) for label in labels])
    return np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)), labels
