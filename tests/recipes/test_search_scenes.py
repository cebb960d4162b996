"""The world to search in: its searcher's probabilities, its pictures, and the Markov chains that know less."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recipes.markov_search import MarkovSearcher, fit_centre, fit_markov, fit_markov_target, fit_uniform
from recipes.search_scenes import (
    CROP_SIZE,
    SHAPES,
    Searcher,
    SearchScenes,
    grid_distances,
    objects,
    picture,
    render,
    sample_scenes,
    to_model,
)
from vision.scanpath.appearance import cut
from vision.scanpath.metrics import behaviour, next_object
from vision.scanpath.model import next_objects
from vision.scanpath.scenes import PAD

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS, COUNT = 3, 9, 27


@pytest.fixture(scope="module")
def searches() -> tuple[SearchScenes, np.ndarray, np.ndarray]:
    """Scenes, searches `[P, T]`, and the scene of each."""
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 300)
    paths = Searcher().search(rng, scenes, 4)
    return scenes, paths.reshape(1200, -1), np.repeat(np.arange(300), 4)


def nats(log_probs: np.ndarray, paths: np.ndarray) -> float:
    return next_object(log_probs, next_objects(torch.from_numpy(paths), COUNT), ignore_index=PAD)["nats"]


def one(values: np.ndarray, n: int) -> list[float]:
    return values[n].tolist()


def chances_by_hand(scenes: SearchScenes, n: int, past: list[int]) -> list[float]:
    """Of what follows some fixations, from the equations, object by object."""

    def features(o: int) -> list[float]:
        hue, angle = one(scenes.hue, n)[o], one(scenes.angle, n)[o]
        kind = [0.7 * (shape == one(scenes.shape, n)[o]) for shape in range(5)]
        stripes = [0.5 * math.cos(2 * angle), 0.5 * math.sin(2 * angle), 0.6 * one(scenes.frequency, n)[o]]
        return [math.cos(hue), math.sin(hue), one(scenes.lightness, n)[o], *kind, *stripes]

    target, at = int(scenes.targets[n]), past[-1]
    utilities = []
    for o in range(COUNT):
        if o == at:
            utilities.append(2.75 - 0.62 + (1.3 if at == target else 0))
            continue
        alike = math.exp(-(math.dist(features(o), features(target)) ** 2) / (2 * 0.7**2))
        distance = math.dist(divmod(o, COLUMNS), divmod(at, COLUMNS))
        ago = past[::-1].index(o) if o in past else None  # 0 would be now
        memory = 0.95**ago if ago is not None else 0.0
        utilities.append(7.5 * alike / (1 + (distance / 5.5) ** 2) - 0.62 * distance - 4.3 * memory)
    total = sum(map(math.exp, utilities))
    stop = 0.36 if at == target else 0.004
    return [*((1 - stop) * math.exp(u) / total for u in utilities), stop]


def test_the_searchers_probabilities_are_those_of_its_equations(searches: tuple):
    scenes, paths, scene_of = searches
    for search in (0, 5, 17):
        path = [int(o) for o in paths[search] if o != PAD]
        log_probs = Searcher().log_probs(scenes, paths[search : search + 1], scene_of[search : search + 1])[0]
        for step in range(1, len(path) + 1):
            expected = chances_by_hand(scenes, scene_of[search], path[:step])
            assert np.exp(log_probs[step]) == pytest.approx(expected, abs=1e-12)


def test_a_search_begins_around_half_a_row_above_the_middle(searches: tuple):
    scenes, paths, scene_of = searches
    first = np.exp(Searcher().log_probs(scenes, paths[:1], scene_of[:1])[0, 0])
    weights = [
        math.exp(-(((o // 9 - 0.5) / 1.3) ** 2 + ((o % 9 - 4) / 1.7) ** 2) / 2) for o in range(COUNT)
    ]  # fmt: skip
    assert first[:-1] == pytest.approx(np.array(weights) / sum(weights))
    assert first[-1] == 0


def test_probabilities_sum_to_one_and_the_longest_search_ends(searches: tuple):
    scenes, paths, scene_of = searches
    short = Searcher(max_length=5)
    log_probs = short.log_probs(scenes, paths[:40, :5], scene_of[:40])
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1)
    assert (np.exp(log_probs[:, 5, -1]) == 1).all() and (log_probs[:, :5, -1] < -0.3).all()
    assert short.search(np.random.default_rng(0), scenes).shape[-1] == 5


def test_searches_follow_the_probabilities():
    rng = np.random.default_rng(1)
    scenes = sample_scenes(rng, 1)
    paths = Searcher(max_length=2).search(rng, scenes, 20_000)[0]
    first = int(np.bincount(paths[:, 0]).argmax())
    following = paths[paths[:, 0] == first, 1]
    expected = np.exp(Searcher().log_probs(scenes, np.array([[first]])))[0, 1]
    seen = np.bincount(np.where(following == PAD, COUNT, following), minlength=COUNT + 1)
    error = seen / len(following) - expected
    assert (np.abs(error) < 4 * np.sqrt(expected / len(following)) + 1e-3).all()


def test_nothing_that_is_known_of_a_search_beats_the_searcher(searches: tuple):
    scenes, paths, scene_of = searches
    log_probs = Searcher().log_probs(scenes, paths, scene_of)
    counted = next_objects(torch.from_numpy(paths), COUNT).numpy() != PAD
    with np.errstate(invalid="ignore"):
        entropy = -np.nansum(np.exp(log_probs) * log_probs, -1)[counted].mean()
    assert nats(log_probs, paths) == pytest.approx(entropy, abs=0.03)
    worse = [Searcher(beta=5), Searcher(ior=2), Searcher(tau=1.2), Searcher(cost=0.3), Searcher(stay=3.5)]
    assert all(nats(s.log_probs(scenes, paths, scene_of), paths) > nats(log_probs, paths) + 0.02 for s in worse)


@pytest.mark.parametrize(("rows", "columns", "steps", "found"), [(6, 14, 20.0, 0.92), (3, 9, 9.2, 0.97)])
def test_searchers_have_habits_like_those_of_people(rows: int, columns: int, steps: float, found: float):
    rng = np.random.default_rng(2)
    scenes = sample_scenes(rng, 200, rows, columns)
    paths = Searcher().search(rng, scenes, 3).reshape(600, -1)
    habits = behaviour([path[path != PAD] for path in paths], scenes.targets.repeat(3).tolist())
    assert habits["steps"] == pytest.approx(steps, rel=0.12)
    assert habits["found"] == pytest.approx(found, abs=0.04)
    assert (habits["search"], habits["refixation"], habits["revisit"]) == pytest.approx((0.71, 0.2, 0.09), abs=0.05)


def test_lookalikes_exist_and_the_target_is_most_like_itself(searches: tuple):
    scenes = searches[0]
    likeness = Searcher().likeness(scenes)
    every = np.arange(len(scenes))
    assert (likeness[every, scenes.targets] == 1).all() and (likeness >= 0).all()
    others = np.sort(likeness, 1)[:, :-1]
    assert 0.5 < (others[:, -1] > 0.3).mean() < 1 and np.median(others) < 0.1


def test_scenes_are_those_of_their_seed_and_parts_of_them_are_too():
    a, b = (sample_scenes(np.random.default_rng(3), 5) for _ in range(2))
    assert torch.equal(render(a), render(b))
    assert torch.equal(render(a.select(np.array([3]))), render(a)[3 * COUNT : 4 * COUNT])
    assert a.select(slice(1, 3)).targets.tolist() == a.targets[1:3].tolist()


def five_shapes(**change: float) -> torch.Tensor:
    """Crops `[5, 3, H, W]` of each shape: red, of middle lightness, with few and upright stripes; or changed."""
    values = {"hue": 0.0, "lightness": 0.5, "angle": 0.0, "frequency": 0.0} | change
    arrays = {name: np.full((1, len(SHAPES)), value) for name, value in values.items()}
    return render(SearchScenes(1, len(SHAPES), **arrays, shape=np.arange(len(SHAPES))[None], targets=np.array([0])))


def test_a_crop_shows_hue_lightness_shape_and_stripes():
    crops = five_shapes()
    assert crops.shape == (len(SHAPES), 3, *CROP_SIZE) and crops.min() >= 0 and crops.max() <= 1
    covered = (crops - 128 / 255).abs().amax(1) > 0.1
    assert (covered.float().mean((1, 2)) - 0.33).abs().max() < 0.1  # areas tell little
    assert all((covered[a] != covered[b]).float().mean() > 0.02 for a in range(len(SHAPES)) for b in range(a))
    middle = (slice(None), slice(None), 18, 12)
    for colour, turn in enumerate((0, 2 * np.pi / 3, 4 * np.pi / 3)):  # red, green, blue
        assert (five_shapes(hue=turn)[middle].argmax(1) == colour).all()
    assert (five_shapes(lightness=0.7)[middle] > crops[middle] + 0.1).all()
    inside = (SHAPES.index("square"), slice(None), slice(12, 24), slice(6, 18))
    upright, lying = crops[inside], five_shapes(angle=np.pi / 2)[inside]  # [3, 12, 12]
    assert upright.std(2).max() > 0.05 > upright.std(1).max()
    assert lying.std(1).max() > 0.05 > lying.std(2).max()


def test_what_is_cut_out_of_a_picture_are_the_crops():
    scenes = sample_scenes(np.random.default_rng(4), 2, 2, 5)
    crops = cut(picture(scenes, 1), objects(2, 5), CROP_SIZE)
    assert isinstance(crops, torch.Tensor)
    torch.testing.assert_close(crops, render(scenes)[10:])


def test_a_model_gets_the_cells_row_by_row():
    scenes = sample_scenes(np.random.default_rng(5), 2, 2, 3)
    given = to_model(scenes, render(scenes))
    assert given.positions[1].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert given.targets.tolist() == scenes.targets.tolist() and given.counts.tolist() == [6, 6]
    assert given.looks is not None and len(given.looks) == 12


FITS = (fit_uniform, fit_centre, fit_markov, fit_markov_target)


def test_several_targets_of_a_scene_share_its_looks():
    scenes = sample_scenes(np.random.default_rng(0), 2, 2, 3)
    targets = np.array([[0, 4, 4], [5, 1, 0]])
    several = scenes.with_targets(targets)
    assert several.targets.tolist() == targets.ravel().tolist() and (several.rows, several.columns) == (2, 3)
    for n in range(6):
        assert several.hue[n].tolist() == scenes.hue[n // 3].tolist()
    looks = render(scenes)
    given = to_model(several, looks)
    assert given.looks is looks and given.look_of is not None and len(given.look_of) == int(given.counts.sum())
    assert torch.equal(looks[given.look_of], render(several))
    assert to_model(scenes, looks).look_of is None and to_model(several).look_of is None


def test_what_knows_more_is_nearer_to_the_searcher(searches: tuple):
    scenes, paths, scene_of = searches
    train, test = slice(0, 800), slice(800, 1200)
    found = [
        nats(
            fit(ROWS, COLUMNS, scenes.targets[scene_of[train]], paths[train]).log_probs(
                scenes.targets[scene_of[test]], paths[test]
            ),
            paths[test],
        )
        for fit in FITS
    ]
    best = nats(Searcher().log_probs(scenes, paths[test], scene_of[test]), paths[test])
    uniform, centre, markov, with_target = found
    assert uniform == pytest.approx(math.log(27), abs=0.05) and centre == pytest.approx(uniform, abs=0.1)
    assert best + 0.3 < with_target < markov - 0.15 and markov < centre - 0.5


@pytest.mark.parametrize("fit", FITS)
def test_chains_are_distributions_and_are_followed(fit, searches: tuple):
    scenes, paths, scene_of = searches
    chain: MarkovSearcher = fit(ROWS, COLUMNS, scenes.targets[scene_of], paths)
    np.testing.assert_allclose(np.exp(chain.tables).sum(-1), 1)
    assert (chain.tables[:, -1, -1] == -np.inf).all()  # no end before the first fixation
    targets = np.full(8000, 13)
    drawn = chain.search(np.random.default_rng(0), targets, max_length=2)
    at = int(np.bincount(drawn[:, 0]).argmax())
    following = np.where(drawn[:, 1] == PAD, COUNT, drawn[:, 1])[drawn[:, 0] == at]
    expected = np.exp(chain.log_probs(targets[:1], np.array([[at]])))[0, 1]
    seen = np.bincount(following, minlength=COUNT + 1) / len(following)
    assert (np.abs(seen - expected) < 4 * np.sqrt(expected / len(following)) + 1e-3).all()


@pytest.mark.parametrize("fit", [fit_markov, fit_markov_target])
def test_a_chain_is_found_again_from_what_it_did(fit, searches: tuple):
    scenes, paths, scene_of = searches
    chain = fit(ROWS, COLUMNS, scenes.targets[scene_of], paths)
    targets = np.random.default_rng(1).integers(COUNT, size=500)
    drawn = chain.search(np.random.default_rng(2), targets, max_length=900)
    again = fit(ROWS, COLUMNS, targets, drawn)
    fresh = chain.search(np.random.default_rng(3), targets, max_length=900)
    lost = nats(again.log_probs(targets, fresh), fresh) - nats(chain.log_probs(targets, fresh), fresh)
    assert -0.005 < lost < 0.05


def test_distances_are_in_cells():
    assert grid_distances(2, 3)[0].tolist() == pytest.approx([0, 1, 2, 1, math.sqrt(2), math.sqrt(5)])
