"""Drawn scanpaths: where circles, numbers and frames are, the density of looks, the film, and bad input."""

from __future__ import annotations

import math
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from vision.scanpath.draw import _COLOURS, _ranges, _stops, density_map, draw_density, draw_scanpaths, write_gif
from vision.scanpath.objects import RegularGrid

COFFEE = Path(__file__).parents[3] / "samples" / "coffee.jpg"
BLUE, VERMILLION = 0, 1
GAP, TITLE = 8, 26
PATH = [[100, 50], [300, 60], [280, 150], [60, 170]]


@pytest.fixture
def plain() -> Image.Image:
    return Image.new("RGB", (400, 200), "white")


def tinted(page: Image.Image, colour: int) -> np.ndarray:
    """Where a colour shows, however much of the white ground shines through."""
    rgb = np.asarray(page, float) - 255
    wanted = np.array(_COLOURS[colour], float) - 255
    share = (rgb @ wanted) / (wanted @ wanted)
    off = np.linalg.norm(rgb - share[..., None] * wanted, axis=-1)
    return (share > 0.5) & (off < 12)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(mask)
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def changes(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.asarray(ImageChops.difference(a, b)).max(-1) > 8


# --- circles and arrows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [400, 800])
def test_circles_lie_where_the_fixations_are_at_any_size(plain: Image.Image, side: int):
    scale = side / 400
    page = draw_scanpaths(plain, PATH, longer_side=side)
    assert page.size == (side, side // 2)
    changed = changes(page, draw_scanpaths(plain, [], longer_side=side))
    for x, y in PATH:
        x, y = round(x * scale), round(y * scale)
        assert changed[y - 9 : y + 10, x - 9 : x + 10].mean() > 0.6  # the number is white
    first = draw_scanpaths(plain, PATH[:1], longer_side=side)
    left, upper, right, lower = box_of(changes(first, draw_scanpaths(plain, [], longer_side=side)))
    assert (left + right) / 2 == pytest.approx(100 * scale, abs=1.5)
    assert (upper + lower) / 2 == pytest.approx(50 * scale, abs=1.5)
    assert right - left == pytest.approx(2 * side / 40, abs=4)


def test_arrows_join_the_fixations_in_order(plain: Image.Image):
    """Halfway between neighbours there is colour; between others there is none; heads are at the later end."""
    page = tinted(draw_scanpaths(plain, PATH, longer_side=400), BLUE)
    middle = [np.mean(pair, axis=0).round().astype(int) for pair in pairwise(PATH)]
    assert all(page[y - 1 : y + 2, x - 1 : x + 2].any() for x, y in middle)
    x, y = np.mean([PATH[0], PATH[3]], axis=0).round().astype(int)
    assert not page[y - 3 : y + 4, x - 3 : x + 4].any()
    level = tinted(draw_scanpaths(plain, [[100, 100], [300, 100]], longer_side=400), BLUE)
    assert level[90:110, 280:289].sum() > 2 * level[90:110, 112:121].sum() > 0


def test_area_is_in_proportion_to_duration():
    path = np.array([[10, 10, 0.2], [100, 10, 0.4], [200, 10, 0.2]])
    stops, order = _stops(path, 3, radius=10)
    assert [stop.radius for stop in stops] == pytest.approx([10, 10 * math.sqrt(2), 10])
    assert order == [0, 1, 2]
    extreme, _ = _stops(np.array([[0, 0, 1], [9, 9, 1], [50, 50, 100]], float), 3, radius=10)
    assert extreme[2].radius == 25


def test_circles_keep_their_size_while_a_film_goes_on():
    path = np.array([[10, 10, 0.2], [100, 10, 0.8], [200, 10, 0.4]])
    whole, _ = _stops(path, 3, radius=10)
    for shown in range(4):
        assert _stops(path, shown, radius=10)[0] == whole[:shown]


def test_fixations_on_one_place_share_a_circle_with_all_numbers():
    nan = math.nan
    path = np.array([[5, 5, nan], [50, 5, nan], [50, 5, nan], [50, 5, nan], [5, 5, nan]])
    stops, order = _stops(path, 5, radius=10)
    assert [stop.label for stop in stops] == ["1,5", "2-4"] and order == [0, 1, 0]
    assert [stop.radius for stop in stops] == pytest.approx([10 * math.sqrt(2), 10 * math.sqrt(3)])


def test_numbers_are_written_as_ranges():
    assert [_ranges(visits) for visits in ([0], [0, 1, 2, 6], [3, 5, 6])] == ["1", "1-3,7", "4,6-7"]


def test_many_fixations_get_smaller_circles():
    path = np.column_stack((np.arange(80) * 9, np.zeros(80), np.full(80, math.nan)))
    stops, _ = _stops(path.astype(float), 80, radius=10)
    assert {round(stop.radius, 6) for stop in stops} == {5}


def test_the_last_fixation_is_ringed_in_ink(plain: Image.Image):
    page = np.asarray(draw_scanpaths(plain, [[100, 100], [300, 100]], longer_side=400)).astype(int)
    ring = [page[100 - 12 : 100 + 13, x - 12 : x + 13].sum(-1).min(axis=0)[:3].min() for x in (100, 300)]
    assert ring[1] < 250 < ring[0]


def test_no_fixation_draws_the_picture_alone(plain: Image.Image):
    page = draw_scanpaths(plain, np.zeros((0, 2)), longer_side=400)
    assert np.asarray(page).min() == 255


def test_fixations_outside_are_not_seen(plain: Image.Image):
    page = draw_scanpaths(plain, [[-100, -100]], longer_side=400)
    assert np.asarray(page).min() == 255
    assert tinted(draw_scanpaths(plain, [[-100, 100], [200, 100]], longer_side=400), BLUE)[100, 5]


def test_the_picture_is_not_changed():
    picture = Image.open(COFFEE)
    before = picture.tobytes()
    draw_scanpaths(picture, PATH, target=(5, 5, 50, 50))
    draw_density(picture, PATH)
    assert picture.tobytes() == before


# --- panels, target, objects ------------------------------------------------------------------------------------------


def test_human_and_model_stand_side_by_side_in_their_colours(plain: Image.Image):
    page = draw_scanpaths(plain, {"human": PATH, "model": PATH[:1]}, longer_side=400)
    assert page.size == (2 * 400 + GAP, 200 + TITLE)
    left, right = page.crop((0, TITLE, 400, 200 + TITLE)), page.crop((400 + GAP, TITLE, 800 + GAP, 200 + TITLE))
    assert tinted(left, BLUE).sum() > 500 and not tinted(left, VERMILLION).any()
    assert tinted(right, VERMILLION).sum() > 100 and not tinted(right, BLUE).any()
    alone = draw_scanpaths(plain, PATH, longer_side=400)
    assert not changes(left, alone).any()
    titles = page.crop((0, 0, page.width, TITLE))
    assert tinted(titles, BLUE)[:, :400].any() and tinted(titles, VERMILLION)[:, 400:].any()


def test_the_target_is_framed_and_objects_are_outlined(plain: Image.Image):
    nothing = draw_scanpaths(plain, [], longer_side=400)
    framed = changes(draw_scanpaths(plain, [], target=(50, 60, 90, 110), longer_side=400), nothing)
    left, upper, right, lower = box_of(framed)
    assert (left, upper, right, lower) == pytest.approx((50, 60, 90, 110), abs=1)
    assert not framed[70:100, 60:80].any()
    dark = Image.new("RGB", (400, 200), "black")
    grid = RegularGrid(2, 4).on((400, 200))
    outlined = changes(
        draw_scanpaths(dark, [], objects=grid, longer_side=400), draw_scanpaths(dark, [], longer_side=400)
    )
    assert outlined[100].all() and outlined[:, 200].all() and not outlined[20:80, 220:280].any()


def test_colours_differ_for_colour_blind_people():
    """Machado et al. (2009), full protanopia, deuteranopia and tritanopia, on linear light."""
    simulations = (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    )
    linear = (np.array(_COLOURS) / 255) ** 2.2
    for matrix in simulations:
        seen = (linear @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2) * 255
        assert all(np.linalg.norm(a - b) > 25 for a, b in combinations(seen, 2))
        assert np.linalg.norm(seen[BLUE] - seen[VERMILLION]) > 150


# --- density ----------------------------------------------------------------------------------------------------------


def test_density_is_a_sum_of_gaussians():
    paths = [np.array([[10, 5], [12, 6]]), np.zeros((0, 2)), np.array([[30.5, 14.5]])]
    field = density_map(paths, (40, 20), sigma=3)
    y, x = np.mgrid[:20, :40] + 0.5
    slow = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 18) for path in paths for a, b in path)
    assert field.shape == (20, 40) and field.dtype == np.float32
    np.testing.assert_allclose(field, slow / slow.max(), atol=1e-5)


def test_density_weighs_by_duration():
    path = np.array([[10, 10, 0.1], [30, 10, 0.4]])
    field = density_map(path, (40, 20), sigma=2)
    assert field[9, 9] / field[9, 29] == pytest.approx(0.25, rel=1e-3)
    without = density_map([path, path[:, :2]], (40, 20), sigma=2)
    assert without[9, 9] == pytest.approx(without[9, 29], rel=1e-3)


def test_density_without_fixations_is_zero():
    assert density_map([], (40, 20)).shape == (20, 40)
    assert density_map([[], []], (40, 20)).max() == 0


def test_density_is_drawn_where_people_looked():
    page = draw_density(Image.open(COFFEE), [[[100, 100]], [[100, 101], [101, 100]]], longer_side=512)
    rgb = np.asarray(page).astype(int)
    assert page.size == (512, 341)
    assert (rgb[100, 100] - (253, 231, 37)).__abs__().max() < 70, "the bright end of viridis"
    far = rgb[250:, 300:]
    assert np.abs(far[..., 0] - far[..., 2]).max() <= 1, "grey where nobody looked"
    larger = draw_density(Image.open(COFFEE), [[100, 100]], sigma=40, longer_side=1024)
    tinge = np.asarray(larger).astype(int)
    assert larger.size == (1024, 682) and np.ptp(tinge[200, 300]) > 8, "sigma is in pixels of the picture"


# --- film -------------------------------------------------------------------------------------------------------------


def frames_of(path: Path) -> tuple[list[Image.Image], list[int]]:
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        frames, durations = [], []
        for n in range(film.n_frames):
            film.seek(n)
            frames.append(film.convert("RGB"))
            durations.append(film.info["duration"])
    return frames, durations


def test_a_film_shows_one_fixation_more_in_each_frame(tmp_path: Path, plain: Image.Image):
    write_gif(tmp_path / "film.gif", plain, np.column_stack((PATH, [0.1, 0.3, 0.2, 0.25])), longer_side=400)
    frames, durations = frames_of(tmp_path / "film.gif")
    assert durations == [100, 300, 200, 1250]
    for n, frame in enumerate(frames):
        shown = [bool(tinted(frame, BLUE)[y - 6 : y + 7, x - 6 : x + 7].any()) for x, y in PATH]
        assert shown == [k <= n for k in range(4)]


def test_several_scanpaths_run_at_their_own_pace(tmp_path: Path, plain: Image.Image):
    fast = np.column_stack((PATH, np.full(4, 0.1)))
    write_gif(tmp_path / "film.GIF", plain, {"human": fast, "model": PATH[:2]}, longer_side=400, seconds=0.25)
    frames, durations = frames_of(tmp_path / "film.GIF")
    assert frames[0].size == (808, 226)
    assert sum(durations) == 1500
    model = [int(tinted(frame.crop((408, TITLE, 808, 226)), VERMILLION).sum()) for frame in frames]
    assert model == sorted(model) and len(set(model)) == 2


def test_scanpaths_in_a_list_run_one_after_another(tmp_path: Path, plain: Image.Image):
    write_gif(tmp_path / "film.gif", plain, [{"one": PATH}, {"two": PATH[:2]}], longer_side=400, seconds=0.25)
    frames, durations = frames_of(tmp_path / "film.gif")
    assert durations == [250, 250, 250, 1250, 250, 1250]
    blue = [int(tinted(frame, BLUE)[TITLE:].sum()) for frame in frames]
    assert blue[:4] == sorted(blue[:4]) and blue[4] < blue[3] and abs(blue[5] - blue[1]) < 0.02 * blue[1]


def test_a_film_of_nothing_is_the_picture(tmp_path: Path, plain: Image.Image):
    write_gif(tmp_path / "film.gif", plain, [], longer_side=100)
    with Image.open(tmp_path / "film.gif") as film:
        assert getattr(film, "n_frames", 1) == 1 and film.size == (100, 50)


# --- bad input --------------------------------------------------------------------------------------------------------

WHITE = Image.new("RGB", (40, 20), "white")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: draw_scanpaths(WHITE, [[1, 2], [math.nan, 3]]), "scanpath: number 1 is [nan, 3.0]"),
        (lambda: draw_scanpaths(WHITE, {"human": [[1, math.nan]]}), "human: number 0 is [1.0, nan]"),
        (lambda: draw_scanpaths(WHITE, [1, 2, 3]), "scanpath: expected places [T, 2]"),
        (lambda: draw_scanpaths(WHITE, {}), "no scanpaths by name were given"),
        (lambda: draw_scanpaths(WHITE, [], longer_side=10), "longer_side=10 pixels are too few"),
        (lambda: draw_scanpaths(np.zeros((5, 5)), []), "picture [5, 5], float64: expected RGB"),
        (lambda: density_map([[1, math.inf]], (40, 20)), "number 0 is [1.0, inf]"),
        (lambda: density_map([], (40, 0)), "size=(40, 0) and sigma"),
        (lambda: density_map([], (40, 20), sigma=0), "sigma=0 must be positive"),
        (lambda: draw_density(WHITE, [1, 2, 3]), "a scanpath of places"),
        (lambda: draw_density(WHITE, [], sigma=-1), "must be positive"),
        (lambda: write_gif("film.png", WHITE, []), "film.png: expected a name that ends in .gif"),
        (lambda: write_gif("film.gif", WHITE, [], seconds=0), "seconds=0 must be positive"),
        (lambda: write_gif("film.gif", WHITE, [{"a": []}, {"a": [], "b": []}]), "as many panels all along, not 1, 2"),
    ],
)
def test_bad_input_is_named(call: Any, says: str):
    with pytest.raises(ValueError, match=re.escape(says)):
        call()
