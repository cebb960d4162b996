"""Drawn pictures whose class is colour and shape: the class is what is to be seen, and nothing else tells it."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.named_shapes import DIAMETERS, NAMES, pictures, sample
from recipes.scenes import COLOURS, SHAPES, boxes, masks
from recipes.textured import texture


def test_names_are_all_pairs_of_colour_and_shape():
    assert len(set(NAMES)) == len(NAMES) == len(COLOURS) * len(SHAPES)
    assert {tuple(name.split()) for name in NAMES} == {(colour, shape) for colour in COLOURS for shape in SHAPES}


@pytest.mark.parametrize("diameters", [DIAMETERS, (0.75, 0.92)])
def test_a_scene_shows_the_object_of_its_class_whole(diameters: tuple[float, float]):
    rng = np.random.default_rng(0)
    for label in range(len(NAMES)):
        scene = sample(rng, label, diameters)
        (shown,) = scene.objects
        assert shown.name == NAMES[label] and diameters[0] <= shown.diameter <= diameters[1]
        assert (boxes(scene, 1) >= 0).all() and (boxes(scene, 1) <= 1).all()


def test_pictures_show_the_colour_of_their_class_where_the_object_is():
    images, labels = pictures(3, 72, 32)
    assert images.shape == (72, 3, 32, 32) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * 36
    rng = np.random.default_rng(3)
    rng.permutation(72)
    for image, label in zip(images, labels, strict=True):
        scene = sample(rng, int(label))
        inside = masks(scene, 32)[0] > 0.999
        colour = COLOURS[NAMES[label].split()[0]]
        assert inside.sum() > 20 and (image[:, inside] == np.array(colour)[:, None]).all()
        ground = image[:, masks(scene, 32)[0] == 0]
        assert (ground == ground[0]).all() and ground.std() > 3, "the ground is grey, and not plain"
        texture(rng, 32)  # takes from chance what the ground took


def test_a_seed_gives_the_same_pictures_again_and_another_gives_others():
    first, again, other = (pictures(seed, 36, 32) for seed in (0, 0, 1))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert not (first[0][:, None] == other[0][None]).all((2, 3, 4)).any()


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="label=36: expected an index into NAMES, 0 to 35"):
        sample(np.random.default_rng(0), 36)
    with pytest.raises(ValueError, match=r"diameters=\(0.5, 1.0\)"):
        sample(np.random.default_rng(0), 0, (0.5, 1.0))
