"""The model of scanpaths that ships: how it is trained, what it foretells, and its card."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import weights
from recipes import search_model as recipe
from recipes.search_model import SHIPPED, Searches, draw_searches, likelihoods, searches_of, small, step_loss, train
from recipes.search_model_card import MEASURED, card, measure
from recipes.search_scenes import Searcher, render, sample_scenes
from vision.scanpath import checkpoint
from vision.scanpath.model import OAT, next_objects, teacher_forcing_loss
from vision.scanpath.scenes import PAD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def searches() -> Searches:
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 5, 2, 4)
    return searches_of(scenes, Searcher().search(rng, scenes, 4), render(scenes))


@pytest.fixture(scope="module")
def shipped() -> OAT:
    return checkpoint.load(weights.shipped("search_scenes"))


def test_batches_are_of_fresh_scenes_of_one_grid_and_of_about_one_size():
    drawn = list(itertools.islice(draw_searches(np.random.default_rng(0), [(2, 5), (3, 9)], 60), 12))
    sizes = {tuple(batch.scenes.positions.shape[:2]) for batch in drawn}
    assert sizes == {(6 * recipe.TARGETS, 10), (2 * recipe.TARGETS, 27)}
    for batch in drawn:
        assert len(batch.fixations) == len(batch.scene_of) == recipe.SEARCHES * len(batch.scenes)
        looks, look_of = batch.scenes.looks, batch.scenes.look_of
        assert looks is not None and len(looks) * recipe.TARGETS == int(batch.scenes.counts.sum())
        assert look_of is not None and look_of.bincount().tolist() == [recipe.TARGETS] * len(looks)
        assert batch.scene_of.tolist() == [n for n in range(len(batch.scenes)) for _ in range(recipe.SEARCHES)]
    looks = [batch.scenes.looks for batch in drawn if batch.scenes.positions.shape[1] == 27]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(looks, 2))  # type: ignore[arg-type]
    blind = next(draw_searches(np.random.default_rng(0), [(2, 5)], with_looks=False))
    assert blind.scenes.looks is None


def test_the_loss_of_a_step_is_that_of_teacher_forcing(searches: Searches):
    torch.manual_seed(0)
    model = OAT(small(2, 9)).eval()
    expected = teacher_forcing_loss(model(searches.scenes, searches.fixations, searches.scene_of), searches.fixations)
    torch.testing.assert_close(step_loss(model, searches), expected)
    model.zero_grad()
    step_loss(model, searches).backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    teacher_forcing_loss(
        model(searches.scenes, searches.fixations, searches.scene_of), searches.fixations
    ).backward()  # fmt: skip
    for before, weight in zip(gradients, (w for w in model.parameters() if w.grad is not None), strict=True):
        torch.testing.assert_close(before, weight.grad, atol=1e-5, rtol=1e-3)


def test_likelihoods_are_of_what_came(searches: Searches):
    torch.manual_seed(0)
    model = OAT(small(2, 9)).eval()
    log_probs, hits = likelihoods(model, searches)
    counted = next_objects(searches.fixations, 8).numpy() != PAD
    assert (log_probs[~counted] == 0).all() and (log_probs[counted] < 0).all() and not hits[~counted].any()
    expected = teacher_forcing_loss(model(searches.scenes, searches.fixations, searches.scene_of), searches.fixations)
    assert -log_probs.sum() / counted.sum() == pytest.approx(expected.item(), abs=1e-5)


def test_training_learns_where_a_search_starts_and_what_the_target_is():
    torch.manual_seed(0)
    model = OAT(small(2, 9, appearance="none"))
    train(model, draw_searches(np.random.default_rng(0), [(2, 5)], 100, with_looks=False), steps=60)
    assert not model.training
    rng = np.random.default_rng(1)
    scenes = sample_scenes(rng, 50, 2, 5)
    fresh = searches_of(scenes, Searcher().search(rng, scenes, 4), None)
    log_probs, _ = likelihoods(model, fresh)
    count = int((fresh.fixations != PAD).sum()) + len(fresh.fixations)
    assert -log_probs.sum() / count < np.log(11) - 0.4


def test_what_ships_is_what_the_recipe_makes(shipped: OAT):
    assert shipped.config == SHIPPED and not shipped.training
    folder = weights.shipped("search_scenes")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert all(torch.isfinite(tensor).all() for tensor in shipped.state_dict().values())


def test_what_ships_closes_most_of_the_gap_and_looks_at_crops(shipped: OAT):
    rng = np.random.default_rng(30_000)
    scenes = sample_scenes(rng, 60)
    paths = Searcher().search(rng, scenes, 4)
    looks = render(scenes)
    count = (paths != PAD).sum() + paths.shape[0] * paths.shape[1]
    own, shuffled = (
        -likelihoods(shipped, searches_of(scenes, paths, crops))[0].sum() / count
        for crops in (looks, looks[torch.randperm(len(looks), generator=torch.Generator().manual_seed(0))])
    )
    scene_of = np.arange(60).repeat(4)
    flat = paths.reshape(240, -1)
    log_probs = Searcher().log_probs(scenes, flat, scene_of)
    following = next_objects(torch.from_numpy(flat), 27).numpy()
    counted = following != PAD
    best = -np.take_along_axis(log_probs, np.where(counted, following, 0)[..., None], -1)[..., 0][counted].mean()
    assert best < own < best + 0.25
    assert shuffled > own + 0.3


def test_the_card_says_what_is_measured(shipped: OAT):
    text = (weights.shipped("search_scenes") / "README.md").read_text(encoding="utf-8")
    assert [f"| {rows} x {columns} |" in text for rows, columns in MEASURED] == [True] * len(MEASURED)
    found = measure(shipped, 3, 9)
    printed = next(line for line in text.splitlines() if line.startswith("| 3 x 9 |"))
    values = [f"{found[name]:.2f}" for name in ("Markov", "Markov + target", "model", "searcher")]
    assert printed.startswith(f"| 3 x 9 | {' | '.join(values)} |")
    assert found["searcher"] < found["model"] < found["Markov + target"] < found["Markov"]
    assert 0 < found["delta"] < 0.6 and 0.2 < found["top1"] < 0.6


def test_a_card_is_written_of_any_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipes.search_model_card.MEASURED", ((2, 5),))
    torch.manual_seed(0)
    text = card(OAT(small(2, 9)).eval(), steps=7, minutes=3.4)
    assert "seed 0, 7 steps" in text and "3 minutes of one CPU thread" in text and "\n| 2 x 5 | " in text
    assert max(map(len, text.splitlines())) < 140
