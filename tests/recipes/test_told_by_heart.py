"""Scenes whose class is the colour of the object that a heart points to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from recipes.scenes import boxes, detect, draw
from recipes.told_by_heart import CLASSES, HEART, POINTS_TO, pictures, sample, told


@pytest.mark.parametrize("num_others", [0, 2, 6])
def test_the_heart_points_to_one_object_and_its_colour_is_the_class(num_others: int):
    rng = np.random.default_rng(0)
    for n in range(60):
        scene = sample(rng, n % len(CLASSES), num_others)
        assert len(scene.objects) == 3 + num_others
        (heart,) = [item for item in scene.objects if item.shape == HEART]
        item = scene.objects[told(scene)]
        assert (item.shape, item.colour) == (POINTS_TO[heart.colour], CLASSES[n % len(CLASSES)])
        pointed = [item for item in scene.objects if item.shape in POINTS_TO.values()]
        assert len(pointed) == 2 and len({item.colour for item in pointed}) == 2


def test_no_object_touches_another_or_the_edge():
    rng = np.random.default_rng(1)
    for _ in range(60):
        found = boxes(sample(rng, num_others=6), 48)
        assert found.min() >= 0 and found.max() <= 48
        for i, one in enumerate(found):
            for other in found[:i]:
                assert (one[:2] >= other[2:]).any() or (other[:2] >= one[2:]).any()


def test_nothing_but_heart_and_object_together_tells_the_class():
    rng = np.random.default_rng(2)
    hearts = np.zeros((len(CLASSES), len(POINTS_TO)))
    circles = np.zeros((len(CLASSES), len(CLASSES)))
    for n in range(2000):
        label = n % len(CLASSES)
        by_shape = {item.shape: item.colour for item in sample(rng, label, 0).objects}
        hearts[label, list(POINTS_TO).index(by_shape[HEART])] += 1
        circles[label, CLASSES.index(by_shape["circle"])] += 1
    assert hearts.min() > 205 and hearts.max() < 295  # 250 each, give or take
    right = circles.trace() / circles.sum()
    assert right == pytest.approx(0.5, abs=0.04)  # who names the circle's colour is right every second time


def test_labels_are_right_by_what_the_pictures_show():
    rng = np.random.default_rng(3)
    right = 0
    for n in range(40):
        label = n % len(CLASSES)
        names = [own.name.split() for own in detect(draw(sample(rng, label), 96))]
        shapes = [POINTS_TO.get(colour) for colour, shape in names if shape == HEART]
        right += [colour for colour, shape in names if shape in shapes] == [CLASSES[label]]
    assert right >= 37


def test_pictures_depend_on_the_seed_alone_and_all_classes_are_as_many():
    images, labels = pictures(5, 20)
    again, same = pictures(5, 20)
    assert np.array_equal(images, again) and np.array_equal(labels, same)
    assert not np.array_equal(images, pictures(6, 20)[0])
    assert images.shape == (20, 3, 48, 48) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [5] * len(CLASSES)


def test_each_picture_has_noise_of_a_strength_of_its_own_up_to_what_was_asked_for():
    clean, noisy = (pictures(5, 30, noise=noise)[0].astype(float) for noise in (0, 20))
    strengths = []
    for one, other in zip(clean, noisy, strict=True):
        grey = (one > 80) & (one < 175)  # where nothing is cut off
        strengths.append((other - one)[grey].std())
    assert max(strengths) < 21 and min(strengths) < 3
    assert np.mean(strengths) == pytest.approx(10, abs=3)


def test_what_cannot_be_drawn_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="label=4: expected an index into CLASSES"):
        sample(rng, 4)
    with pytest.raises(ValueError, match="num_others=7: expected 0 to 6"):
        sample(rng, num_others=7)
    scene = sample(rng)
    hearts = tuple(item for item in scene.objects if item.shape == HEART)
    for objects in ((), hearts, hearts + scene.objects):
        with pytest.raises(ValueError, match="expected one of each"):
            told(dataclasses.replace(scene, objects=objects))
