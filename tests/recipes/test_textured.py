"""Shapes on textured grounds: the class is the shape, and grounds are of every kind."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.scenes import COLOURS, SHAPES, boxes
from recipes.textured import pictures, sample, texture


def test_the_class_is_the_shape_and_the_colour_any():
    rng = np.random.default_rng(0)
    scenes = [sample(rng, n % len(SHAPES)) for n in range(120)]
    assert all(scene.objects[0].shape == SHAPES[n % len(SHAPES)] for n, scene in enumerate(scenes))
    for shape in SHAPES:
        assert len({scene.objects[0].colour for scene in scenes if scene.objects[0].shape == shape}) > 3
    assert {scene.objects[0].colour for scene in scenes} == set(COLOURS)
    corners = np.concatenate([boxes(scene, 1) for scene in scenes])
    assert corners.min() > 0 and corners.max() < 1
    sides = corners[:, 2] - corners[:, 0]
    assert sides.min() >= 0.35 and sides.max() <= 0.55


def test_pictures_are_those_of_their_seed_and_classes_are_equally_many():
    (images, labels), (again, same), (others, _) = pictures(0, 24, 48), pictures(0, 24, 48), pictures(1, 24, 48)
    assert (images == again).all() and (labels == same).all() and (images != others).any()
    assert images.shape == (24, 3, 48, 48) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [4] * len(SHAPES) and len(set(labels[:6].tolist())) > 2


def test_a_ground_has_stripes_and_spots_around_nothing():
    rng = np.random.default_rng(0)
    grounds = np.stack([texture(rng, 48) for _ in range(50)])
    assert grounds.shape == (50, 48, 48) and abs(grounds.mean()) < 5
    assert grounds.std((1, 2)).min() > 8 and np.abs(grounds).max() < 120


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(ValueError, match="label=6: expected an index into SHAPES, 0 to 5"):
        sample(np.random.default_rng(0), 6)
