"""Makes the sample pictures of the demos, `apps/demos/examples/`: photographs, drawn scenes, shelves to search.

python docs/examples.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes.scene_questions import picture_of, sample_scene_of_many  # noqa: E402
from recipes.search_scenes import picture, sample_scenes  # noqa: E402

EXAMPLES = ROOT / "apps" / "demos" / "examples"


def photographs() -> None:
    """The sample photographs, smaller."""
    for path in sorted((ROOT / "samples").glob("*.jpg")):
        with Image.open(path) as image:
            image.thumbnail((448, 448), Image.Resampling.LANCZOS)
            image.convert("RGB").save(_folder("photographs") / path.name, quality=88)


def scenes(count: int = 4) -> None:
    """Scenes like those that the small vision-language model has learned from."""
    rng = np.random.default_rng(7)
    for number in range(1, count + 1):
        drawn = picture_of(rng, sample_scene_of_many(rng, held_out=False))
        Image.fromarray(drawn).save(_folder("scenes") / f"scene_{number}.png", optimize=True)


def shelves() -> None:
    """Grids of objects like those that the small model of scanpaths has learned from."""
    rng = np.random.default_rng(7)
    for rows, columns in ((3, 9), (4, 7), (3, 6)):
        drawn = picture(sample_scenes(rng, 1, rows, columns))
        drawn.save(_folder("shelves") / f"shelf_{rows}_by_{columns}.png", optimize=True)


def _folder(kind: str) -> Path:
    folder = EXAMPLES / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    photographs()
    scenes()
    shelves()
