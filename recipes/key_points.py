"""Stick figures among other things, with the exact place of every joint: pictures for pixel-wise regression.

A `Figure` is a description without pixels, in fractions of the picture. It stands in front of coloured shapes
(`recipes.scenes`) and of loose sticks that look like its limbs, so that a joint is told by what it hangs on to. Left
and right are those of the picture; a figure leans, and its upper arms stay on their side.

    figure = sample(np.random.default_rng(0))
    images, joints = pictures(seed=0, num=100)    # [100, 3, 48, 48] uint8, [100, 11, 2] as x and y in pixels
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from recipes.scenes import COLOURS, SHAPES, Scene, SceneObject
from recipes.scenes import draw as draw_scene

__all__ = ["BONES", "JOINTS", "Figure", "draw", "pictures", "sample"]

Floats = NDArray[np.float64]

JOINTS = (
    "head", "neck", "pelvis", "left elbow", "left hand", "right elbow", "right hand", "left knee", "left foot",
    "right knee", "right foot",
)  # fmt: skip
BONES = ((0, 1), (1, 2), (1, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (2, 9), (9, 10))
"""Pairs of joints with a stick between them."""

_SUPERSAMPLING = 8  # sticks are drawn this much finer, then averaged
# Lengths in heights of a figure: head to neck, trunk, upper arm, forearm, thigh, shank.
_HEAD, _TRUNK, _ARM, _FOREARM, _THIGH, _SHANK = 0.16, 0.32, 0.2, 0.2, 0.26, 0.26
_HEAD_RADIUS = 0.085
_HEIGHTS = (0.6, 0.85)  # of a figure, in fractions of the picture
_EDGE = 0.03  # between a joint and the picture's edge
_LEAN = np.pi / 7
_THICKNESS = (0.03, 0.045)  # of sticks, in fractions of the picture
_GREYS, _GROUNDS = (20, 90), (205, 240)  # of sticks, of the ground
_DIAMETERS = (0.12, 0.25)  # of the coloured shapes


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure and what is around it.

    Attributes:
        joints: `[11, 2]`, x and y of `JOINTS` in fractions of the picture.
        height: From head to foot if it stood straight, in fractions of the picture.
        sticks: `[S, 2, 2]`, the ends of loose sticks.
        thickness: Of all sticks.
        grey: Of the figure and of the sticks.
        scene: Coloured shapes behind them.
    """

    joints: Floats
    height: float
    sticks: Floats
    thickness: float
    grey: int
    scene: Scene


def _way(angle: float) -> Floats:
    """One length in a direction; 0 is down, a quarter of a turn is right in the picture."""
    return np.array([np.sin(angle), np.cos(angle)])


def _joints(rng: np.random.Generator) -> Floats:
    """A pose of height 1, its neck in the origin."""
    lean = rng.uniform(-_LEAN, _LEAN)
    pelvis = _TRUNK * _way(lean)
    head = -_HEAD * _way(lean + rng.uniform(-0.3, 0.3))
    limbs = []
    for start, lengths, opening, bend in (
        (np.zeros(2), (_ARM, _FOREARM), (0.3, 2.6), 1.2),
        (pelvis, (_THIGH, _SHANK), (0.1, 0.7), 0.5),
    ):
        for side in (-1, 1):  # left, right
            first = lean + side * rng.uniform(*opening)
            middle = start + lengths[0] * _way(first)
            limbs += [middle, middle + lengths[1] * _way(first + rng.uniform(-bend, bend))]
    return np.stack([head, np.zeros(2), pelvis, *limbs])


def sample(rng: np.random.Generator, num_sticks: int = 6, num_shapes: int = 3) -> Figure:
    """Draws a figure that lies within the picture, and what is around it.

    Args:
        rng: Where chance comes from.
        num_sticks: Loose sticks.
        num_shapes: Coloured shapes.
    """
    height = rng.uniform(*_HEIGHTS)
    while True:
        joints = _joints(rng) * height
        room = 1 - 2 * _EDGE - np.ptp(joints, axis=0)
        if (room > 0).all():
            break
    joints += _EDGE + rng.uniform(0, 1, 2) * room - joints.min(0)
    middles = rng.uniform(0, 1, (num_sticks, 2))
    angles = rng.uniform(0, np.pi, num_sticks)
    halves = height * rng.uniform(0.08, 0.16, num_sticks)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    objects = tuple(
        SceneObject(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), (float(x), float(y)), float(diameter))
        for (x, y), diameter in zip(
            rng.uniform(0, 1, (num_shapes, 2)), rng.uniform(*_DIAMETERS, num_shapes), strict=True
        )
    )
    return Figure(
        joints,
        height=float(height),
        sticks=np.stack([middles - halves, middles + halves], 1),
        thickness=float(rng.uniform(*_THICKNESS)),
        grey=int(rng.integers(*_GREYS)),
        scene=Scene(objects, ground=int(rng.integers(*_GROUNDS))),
    )


def draw(figure: Figure, size: int = 48) -> NDArray[np.uint8]:
    """Draws a figure with smooth edges.

    Args:
        figure: What to draw.
        size: Side of the picture in pixels.

    Returns:
        `[size, size, 3]`, RGB.
    """
    fine = np.zeros((size * _SUPERSAMPLING,) * 2, np.uint8)

    def at(point: Floats) -> tuple[int, int]:
        # OpenCV counts from the middle of the first pixel, and takes fractions of a pixel in the last four bits.
        x, y = np.rint((point * size * _SUPERSAMPLING - 0.5) * 16).astype(int)
        return int(x), int(y)

    thickness = max(1, round(figure.thickness * size * _SUPERSAMPLING))
    lines = [*figure.sticks, *(figure.joints[[start, end]] for start, end in BONES)]
    for start, end in lines:
        cv2.line(fine, at(start), at(end), 255, thickness, shift=4)
    radius = round(_HEAD_RADIUS * figure.height * size * _SUPERSAMPLING * 16)
    cv2.circle(fine, at(figure.joints[0]), radius, 255, cv2.FILLED, shift=4)
    share = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)[..., None] / 255
    behind = draw_scene(figure.scene, size)
    return np.rint(behind + share * (figure.grey - behind.astype(np.float32))).astype(np.uint8)


def pictures(seed: int, num: int, size: int = 48) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draws pictures.

    Args:
        seed: Of everything.
        num: N.
        size: Side in pixels.

    Returns:
        `[N, 3, size, size]`, RGB, and the joints, `[N, 11, 2]`, x and y in pixels from the picture's left upper corner.
    """
    rng = np.random.default_rng(seed)
    figures = [sample(rng) for _ in range(num)]
    drawn = np.stack([draw(figure, size) for figure in figures])
    joints = np.stack([figure.joints for figure in figures]) * size
    return np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)), joints.astype(np.float32)
