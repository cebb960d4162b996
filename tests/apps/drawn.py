"""Drawn pictures in class folders, for tests of what learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.scenes import Scene, SceneObject, draw

COLOURS = ("blue", "green", "red")


def draw_classes(folder: Path, each: int, colours: Sequence[str] = COLOURS, size: int = 32, seed: int = 0) -> Path:
    """A folder for each colour with so many pictures of a shape of it; the shape says nothing."""
    rng = np.random.default_rng(seed)
    for colour in colours:
        (folder / colour).mkdir(parents=True)
        for index in range(each):
            x, y = rng.uniform(0.4, 0.6, 2)
            shape = str(rng.choice(["circle", "cross", "square"]))
            thing = SceneObject(shape, colour, (float(x), float(y)), float(rng.uniform(0.5, 0.7)))
            picture = draw(Scene((thing,), int(rng.integers(205, 240))), size)
            Image.fromarray(picture).save(folder / colour / f"{index:02d}.png")
    return folder
