"""The drawn world: what is drawn is what the ground truth says, and the detector reads it back."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from recipes.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    SceneObject,
    boxes,
    caption,
    detect,
    detector_errors,
    draw,
    masks,
    sample_scene,
)

NAMES = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]


def some_scenes(num: int, seed: int = 0) -> list[Scene]:
    """Alternately one and two objects, of all colours and shapes."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, [str(name) for name in rng.choice(NAMES, 1 + n % 2)]) for n in range(num)]


@pytest.mark.parametrize("size", [32, 64, (48, 96)])
def test_the_detector_errs_on_less_than_one_object_in_a_hundred(size):
    scenes = some_scenes(300)
    errors = detector_errors([draw(scene, size) for scene in scenes], scenes)
    assert errors.objects == 450
    assert errors.misses < 0.01 * errors.objects
    assert errors.false_alarms < 0.01 * errors.objects


def test_the_detector_reads_soft_and_noisy_pictures():
    rng = np.random.default_rng(0)
    scenes = some_scenes(100)
    blurred = [cv2.GaussianBlur(draw(scene, 64).astype(np.float32), (0, 0), 1.2) for scene in scenes]
    noisy = [np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8) for picture in blurred]
    errors = detector_errors(noisy, scenes)
    assert errors.misses + errors.false_alarms < 0.02 * errors.objects


def test_errors_of_the_detector_are_counted_on_both_sides():
    circle, square = (SceneObject(shape, "red", (0.3, 0.3), 0.4) for shape in ("circle", "square"))
    picture = draw(Scene((circle,), 220), 64)
    wrong = detector_errors([picture, picture], [Scene((square,), 220), Scene((), 220)])
    assert (wrong.objects, wrong.misses, wrong.false_alarms) == (1, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_object_is_found_where_it_was_drawn(name: str):
    scene = sample_scene(np.random.default_rng(7), [name])
    (found,) = detect(draw(scene, 64))
    assert found.name == name
    assert np.abs(np.array(found.box) - boxes(scene, 64)[0]).max() <= 2
    assert found.score > 0.85


def test_nothing_is_found_on_an_empty_ground_or_in_a_blot():
    assert detect(draw(Scene((), 220), 64)) == []
    blot = np.full((64, 64, 3), 220, np.uint8)
    blot[20:24, 4:60] = COLOURS["blue"]  # a bar is no shape of this world
    assert detect(blot) == []


@pytest.mark.parametrize("picture", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_the_detector_refuses_what_is_no_picture(picture: np.ndarray):
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
        detect(picture)


@pytest.mark.parametrize("size", [32, (40, 72)])
def test_masks_lie_in_their_boxes_and_have_the_colour_of_their_object(size):
    for scene in some_scenes(20):
        picture, shares, frames = draw(scene, size), masks(scene, size), boxes(scene, size)
        assert picture.shape[:2] == shares.shape[1:]
        for item, share, (left, top, right, bottom) in zip(scene.objects, shares, frames, strict=True):
            rows, columns = np.nonzero(share > 0.5)
            assert left - 1 <= columns.min() and columns.max() < right + 1
            assert top - 1 <= rows.min() and rows.max() < bottom + 1
            assert (picture[share == 1] == COLOURS[item.colour]).all()
        assert (picture[shares.sum(0) == 0] == scene.ground).all()


def test_a_later_object_covers_an_earlier_one():
    square = SceneObject("square", "blue", (0.5, 0.5), 0.6)
    circle = SceneObject("circle", "red", (0.5, 0.5), 0.3)
    below, above = masks(Scene((square, circle), 220), 64)
    assert (below + above).max() <= 1
    assert below[32, 32] == 0 and above[32, 32] == 1
    assert below[15, 15] == 1


def test_an_area_is_that_of_the_ideal_shape():
    share = {
        shape: masks(Scene((SceneObject(shape, "red", (0.5, 0.5), 0.5),), 220), 200).sum() / 100**2 for shape in SHAPES
    }
    assert share["square"] == pytest.approx(1, abs=0.01)
    assert share["circle"] == pytest.approx(np.pi / 4, abs=0.01)
    assert share["triangle"] == pytest.approx(1 / 2, abs=0.01)
    assert share["diamond"] == pytest.approx(1 / 2, abs=0.01)
    assert share["cross"] == pytest.approx(5 / 9, abs=0.01)


def test_sampled_objects_stay_inside_and_apart():
    rng = np.random.default_rng(0)
    for _ in range(100):
        frames = boxes(sample_scene(rng, ["red circle", "green heart"]), 100)
        assert frames.min() > 0 and frames.max() < 100
        a, b = frames
        assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) > 0


def test_a_seed_gives_the_same_scenes_again():
    assert some_scenes(10, seed=3) == some_scenes(10, seed=3)
    assert some_scenes(10, seed=3) != some_scenes(10, seed=4)


def test_captions_name_the_objects_in_order():
    assert caption(["red circle"]) == "a red circle"
    assert caption(["red circle", "blue square"]) == "a red circle and a blue square"


@pytest.mark.parametrize(("shape", "colour"), [("blob", "red"), ("circle", "mauve")])
def test_unknown_shapes_and_colours_are_named(shape: str, colour: str):
    with pytest.raises(ValueError, match=r"blob|mauve"):
        SceneObject(shape, colour, (0.5, 0.5), 0.4)
