"""Stick figures: joints are where the picture shows them, and nothing else in it has eleven."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from recipes import key_points
from recipes.key_points import BONES, JOINTS, draw, pictures, sample
from recipes.scenes import Scene

FIGURES = [sample(np.random.default_rng(n)) for n in range(60)]
PLACE = {name: n for n, name in enumerate(JOINTS)}


def dark(figure: key_points.Figure, size: int) -> np.ndarray:
    """Where a figure alone on its ground is dark, `[size, size]`."""
    alone = replace(figure, sticks=figure.sticks[:0], scene=Scene((), figure.scene.ground))
    return draw(alone, size)[..., 0] < (figure.grey + figure.scene.ground) / 2


def test_joints_lie_in_the_picture():
    joints = np.stack([figure.joints for figure in FIGURES])
    assert joints.shape == (60, 11, 2) and joints.min() >= 0.03 - 1e-9 and joints.max() <= 0.97 + 1e-9


def test_bones_have_the_lengths_of_a_figure_and_hang_together():
    assert sorted(set(itertools.chain(*BONES))) == list(range(11)) and len(BONES) == 10
    lengths = np.array(
        [
            [np.linalg.norm(np.subtract(*figure.joints[list(bone)])) / figure.height for bone in BONES]
            for figure in FIGURES
        ]
    )
    assert np.ptp(lengths, axis=0).max() < 1e-9  # whatever the pose
    assert lengths[0] == pytest.approx([0.16, 0.32, 0.2, 0.2, 0.2, 0.2, 0.26, 0.26, 0.26, 0.26])


def test_left_is_left_of_the_trunk():
    """Seen along the trunk, elbows and knees lie on their own side."""
    for figure in FIGURES:
        neck, pelvis = (figure.joints[PLACE[name]] for name in ("neck", "pelvis"))
        down = (pelvis - neck) / np.linalg.norm(pelvis - neck)
        right = np.array([down[1], -down[0]])
        for part, start in (("elbow", neck), ("knee", pelvis)):
            left_side, right_side = (
                (figure.joints[PLACE[f"{side} {part}"]] - start) @ right for side in ("left", "right")
            )
            assert left_side < 0 < right_side


@pytest.mark.parametrize("size", [48, 160])
def test_the_picture_is_dark_at_joints_and_along_bones(size: int):
    for figure in FIGURES[:20]:
        shown = dark(figure, size)
        for start, end in BONES:
            for share in (0.15, 0.5, 0.85):
                x, y = (figure.joints[start] * (1 - share) + figure.joints[end] * share) * size
                assert shown[int(y), int(x)]


def test_a_figure_ends_at_its_hands_and_feet():
    """Without its forearms a figure has nothing where the hands were; so the hand's place is the stick's end."""
    for figure in FIGURES[:20]:
        shown = dark(figure, 480)
        for limb, end in (("elbow", "hand"), ("knee", "foot")):
            for side in ("left", "right"):
                inner, outer = (figure.joints[PLACE[f"{side} {name}"]] for name in (limb, end))
                beyond = outer + (outer - inner) / np.linalg.norm(outer - inner) * (figure.thickness / 2 + 0.006)
                others = np.delete(np.arange(10), BONES.index((PLACE[f"{side} {limb}"], PLACE[f"{side} {end}"])))
                if near_other_bone(figure, beyond, others) or not (0 < beyond).all() or not (beyond < 1).all():
                    continue
                assert not shown[int(beyond[1] * 480), int(beyond[0] * 480)]


def near_other_bone(figure: key_points.Figure, point: np.ndarray, bones: np.ndarray) -> bool:
    """Whether a point is on one of some bones, or on the head."""
    for start, end in (BONES[n] for n in bones):
        a, b = figure.joints[start], figure.joints[end]
        share = np.clip((point - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        if np.linalg.norm(point - a - share * (b - a)) < figure.thickness:
            return True
    return bool(np.linalg.norm(point - figure.joints[0]) < 0.12)


def test_loose_sticks_are_drawn_and_belong_to_no_joint():
    figure = FIGURES[0]
    bare = draw(replace(figure, sticks=figure.sticks[:0]), 96)
    assert (draw(figure, 96) != bare).any()
    assert figure.sticks.shape == (6, 2, 2) and len(figure.scene.objects) == 3
    lengths = np.concatenate([np.linalg.norm(np.subtract(*own.sticks.swapaxes(0, 1)), axis=1) for own in FIGURES])
    assert lengths.min() > 0.09 and lengths.max() < 0.28


def test_pictures_follow_from_the_seed():
    images, joints = pictures(0, 8)
    again, same = pictures(0, 8)
    assert images.shape == (8, 3, 48, 48) and images.dtype == np.uint8 and joints.shape == (8, 11, 2)
    assert np.array_equal(images, again) and np.array_equal(joints, same)
    assert not np.array_equal(pictures(1, 8)[0], images)
    small = pictures(0, 8, 24)
    np.testing.assert_allclose(small[1] * 2, joints, rtol=1e-5)
