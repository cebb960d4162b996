"""Bodies with a small mark: the class is the mark's, the masks say where it is, and nothing else tells the class."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.scenes import COLOURS, boxes, masks
from recipes.small_parts import BODY_COLOURS, CLASSES, draw_sample, pictures


def test_the_class_is_the_mark_on_the_body():
    rng = np.random.default_rng(0)
    for label, (colour, shape) in enumerate(CLASSES):
        body, mark, *loose = draw_sample(rng, label).objects
        assert (mark.colour, mark.shape) == (colour, shape) and len(loose) == 3
        assert body.colour in BODY_COLOURS and body.colour not in {known for known, _ in CLASSES}
        assert all((own.colour, own.shape) in CLASSES for own in loose)


def test_the_mark_lies_on_the_body_and_loose_marks_touch_neither_it_nor_each_other():
    rng = np.random.default_rng(1)
    for _ in range(30):
        scene = draw_sample(rng)
        body = masks(type(scene)(scene.objects[:1], scene.ground), 96)[0]
        alone = [masks(type(scene)((own,), scene.ground), 96)[0] for own in scene.objects[1:]]
        assert body[alone[0] > 0].min() > 0.5  # at the rim of a pixel less than all of it
        for own in alone[1:]:
            assert (
                own[body > 0].max() == 0 and sum(other[own > 0].sum() for other in alone[1:] if other is not own) == 0
            )
        corners = boxes(scene, 1)
        assert corners.min() >= 0 and corners.max() <= 1


def test_pictures_are_those_of_their_seed_and_classes_are_equally_many():
    drawn, again, others = pictures(0, 24), pictures(0, 24), pictures(1, 24)
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True)) and (drawn.images != others.images).any()
    assert drawn.images.shape == (24, 3, 64, 64) and drawn.images.dtype == np.uint8
    assert np.bincount(drawn.labels).tolist() == [3] * len(CLASSES) and len(set(drawn.labels[:8].tolist())) > 3


def test_masks_show_the_marks_of_the_picture():
    drawn = pictures(2, 40)
    assert drawn.parts.shape == drawn.loose.shape == (40, 64, 64)
    for image, label, part, loose in zip(*drawn, strict=True):
        colour = np.array(COLOURS[CLASSES[label][0]])[:, None]
        assert (image[:, part == 1] == colour).all() and (part == 1).sum() > 15
        assert 20 < part.sum() < 0.16**2 * 64**2 + 1 and 3 * 20 < loose.sum() < 3 * 0.16**2 * 64**2 + 3
        assert (part * loose).sum() == 0


def test_loose_marks_say_nothing_of_the_class():
    rng = np.random.default_rng(3)
    same = total = 0
    for n in range(240):
        colour, shape = CLASSES[n % 8]
        loose = draw_sample(rng, n % 8, num_loose=2).objects[2:]
        same += sum((own.colour, own.shape) == (colour, shape) for own in loose)
        total += len(loose)
    assert abs(same / total - 1 / 8) < 4 * (1 / 8 * 7 / 8 / total) ** 0.5


def test_a_class_that_is_none_is_refused():
    with pytest.raises(ValueError, match="label=8: expected an index into CLASSES, 0 to 7"):
        draw_sample(np.random.default_rng(0), 8)
