"""Scenes whose class is a direction: it is what the picture shows, and nothing else gives it away."""

from __future__ import annotations

import numpy as np
import pytest

from recipes import where
from recipes.scenes import COLOURS, boxes, detect, draw

SCENES = [where.sample(np.random.default_rng(n), n % where.DIRECTIONS) for n in range(64)]


def test_the_class_is_the_direction_from_circle_to_square():
    for n, scene in enumerate(SCENES):
        assert where.direction(scene) == n % where.DIRECTIONS
        first, second = scene.objects[:2]
        assert (first.colour, first.shape, second.colour, second.shape) == ("red", "circle", "blue", "square")
    right, below, left, above = (SCENES[n].objects[:2] for n in (0, 4, 8, 12))
    assert right[1].centre[0] > right[0].centre[0] + 0.2 and left[1].centre[0] < left[0].centre[0] - 0.2
    assert below[1].centre[1] > below[0].centre[1] + 0.2 and above[1].centre[1] < above[0].centre[1] - 0.2


def test_the_direction_can_be_read_off_the_picture():
    """Of the things that a detector finds in a large picture the circle and the square lie as the class says."""
    for scene in SCENES[:16]:
        found = {own.name: own.box for own in detect(draw(scene, 192)) if own.name in ("red circle", "blue square")}
        (x0, y0), (x1, y1) = (
            ((left + right) / 2, (top + bottom) / 2)
            for left, top, right, bottom in (found["red circle"], found["blue square"])
        )
        turned = np.arctan2(y1 - y0, x1 - x0) / (2 * np.pi) * where.DIRECTIONS
        off = (turned - where.direction(scene) + 8) % 16 - 8
        assert abs(off) < 0.5 + 0.15  # a class is one wide; what is left is the detector's


def test_objects_lie_in_the_picture_and_apart():
    for scene in SCENES:
        own = boxes(scene, 1)
        assert own.min() > 0 and own.max() < 1 and len(own) == 7
        centres = (own[:, :2] + own[:, 2:]) / 2
        sides = own[:, 2] - own[:, 0]
        for n in range(2, 7):
            gaps = np.abs(centres[:n] - centres[n]).max(1) - (sides[:n] + sides[n]) / 2
            assert gaps.min() > 0.019


def test_no_other_object_is_both_but_each_shares_something():
    kinds = {(item.colour, item.shape) for scene in SCENES for item in scene.objects[2:]}
    assert where.FROM not in kinds and where.TO not in kinds and len(kinds) > 12
    assert all(colour in ("red", "blue") or shape in ("circle", "square") for colour, shape in kinds)


def test_colours_tell_nothing_of_the_class():
    """As many pixels of each colour on average, whatever the direction."""
    images, labels = where.pictures(3, 480, 24)
    hues = np.array(list(COLOURS.values()))
    near = np.abs(images.transpose(0, 2, 3, 1)[..., None, :].astype(int) - hues).max(-1) < 40  # [N, H, W, colours]
    counts = near.sum((1, 2))
    means = np.stack([counts[labels == label].mean(0) for label in range(where.DIRECTIONS)])
    errors = counts.std(0) / np.sqrt(480 / where.DIRECTIONS)
    assert (np.abs(means - counts.mean(0)) < 4.5 * errors).all()


def test_pictures_follow_from_the_seed_and_classes_come_equally_often():
    images, labels = where.pictures(0, 32)
    again, same = where.pictures(0, 32)
    assert images.shape == (32, 3, 48, 48) and images.dtype == np.uint8
    assert np.array_equal(images, again) and np.array_equal(labels, same)
    assert np.bincount(labels).tolist() == [2] * 16
    assert not np.array_equal(where.pictures(1, 32)[0], images)


@pytest.mark.parametrize("num_others", [0, 3])
def test_fewer_others(num_others: int):
    assert len(where.sample(np.random.default_rng(0), 5, num_others).objects) == 2 + num_others
