"""A heart says where to look: drawn scenes whose class is the colour of the object that the heart's colour points to.

Every scene holds a heart, a circle and a cross of two different colours, and maybe other shapes. Under a purple heart
the class is the colour of the circle, under a yellow one that of the cross. Each object is easily told; which of them
counts is said by another one that lies apart.

    scene = sample(np.random.default_rng(0), label=2)
    told(scene)                                   # the index of the object whose colour is the class
    images, labels = pictures(seed=0, num=100)    # [100, 3, 48, 48] uint8, [100]
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject, draw

__all__ = ["CLASSES", "HEART", "POINTS_TO", "pictures", "sample", "told"]

HEART = "heart"
POINTS_TO = {"purple": "circle", "yellow": "cross"}
"""The heart's colour → the shape whose colour is the class."""
CLASSES = tuple(colour for colour in COLOURS if colour not in POINTS_TO)

_OTHERS = tuple(shape for shape in SHAPES if shape not in (HEART, *POINTS_TO.values()))
_CELLS = 3  # a side; each object lies in a cell of its own
_DIAMETERS = (0.26, 0.31)  # in fractions of the picture
_GROUNDS = (205, 240)  # grey levels
_TEXTURE = 10.0  # standard deviation of the ground's noise, in grey levels


def sample(rng: np.random.Generator, label: int | None = None, num_others: int = 2) -> Scene:
    """Places a heart, a circle, a cross, and others.

    Args:
        rng: Where chance comes from.
        label: The colour of the object that the heart points to, an index into `CLASSES`; any if None.
        num_others: Objects beside these three, 0 to 6; each has a shape and a colour of chance.

    Returns:
        The scene, its objects in an order of chance; none covers another.

    Raises:
        ValueError: An unknown class, or a number of objects for which there is no room.
    """
    label = int(rng.integers(len(CLASSES))) if label is None else label
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"label={label}: expected an index into CLASSES, 0 to {len(CLASSES) - 1}.")
    if not 0 <= num_others <= _CELLS**2 - 3:
        raise ValueError(f"num_others={num_others}: expected 0 to {_CELLS**2 - 3}, at most one for each cell.")
    heart, not_told = (list(POINTS_TO)[int(i)] for i in rng.permutation(2))
    another = CLASSES[(label + int(rng.integers(1, len(CLASSES)))) % len(CLASSES)]
    names = [(heart, HEART), (CLASSES[label], POINTS_TO[heart]), (another, POINTS_TO[not_told])]
    names += [
        (CLASSES[int(rng.integers(len(CLASSES)))], _OTHERS[int(rng.integers(len(_OTHERS)))]) for _ in range(num_others)
    ]
    names = [names[int(i)] for i in rng.permutation(len(names))]
    cells = rng.permutation(_CELLS**2)[: len(names)]
    diameters = rng.uniform(*_DIAMETERS, len(names))
    slack = (1 / _CELLS - diameters[:, None]) / 2
    corners = np.stack([cells % _CELLS, cells // _CELLS], 1)
    centres = (corners + 0.5) / _CELLS + rng.uniform(-slack, slack, (len(names), 2))
    objects = tuple(
        SceneObject(shape, colour, (float(x), float(y)), float(diameter))
        for (colour, shape), (x, y), diameter in zip(names, centres, diameters, strict=True)
    )
    return Scene(objects, ground=int(rng.integers(*_GROUNDS, endpoint=True)))


def told(scene: Scene) -> int:
    """Which object the heart points to: its index.

    Raises:
        ValueError: There is not exactly one heart and one object of the shape that it points to.
    """
    shapes = [POINTS_TO.get(item.colour) for item in scene.objects if item.shape == HEART]
    found = [i for i, item in enumerate(scene.objects) if item.shape in shapes]
    if len(shapes) != 1 or len(found) != 1:
        raise ValueError(f"{len(shapes)} hearts that point to {len(found)} objects: expected one of each.")
    return found[0]


def pictures(
    seed: int, num: int, size: int = 48, num_others: int = 2, noise: float = 0.0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws pictures, each class equally often, in an order of chance.

    Args:
        seed: Of everything.
        num: N.
        size: Side in pixels.
        num_others: Objects that are neither heart nor circle nor cross, in each.
        noise: Each picture gets noise of a strength of its own, up to this standard deviation in grey levels.

    Returns:
        Images `[N, 3, size, size]`, RGB, and labels `[N]`, indices into `CLASSES`.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % len(CLASSES))
    images = np.empty((num, 3, size, size), np.uint8)
    for n, label in enumerate(labels):
        texture = rng.normal(0, _TEXTURE, (size, size)).astype(np.float32)
        drawn = draw(sample(rng, int(label), num_others), size, texture).transpose(2, 0, 1)
        grain = rng.uniform(0, noise) * rng.normal(size=drawn.shape)
        images[n] = np.clip(np.rint(drawn + grain), 0, 255)
    return images, labels
