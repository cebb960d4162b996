"""OAT's claims: the values, what follows from them, and the searchers that it is compared with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.claims import measured as kept
from benchmarks.claims import oat, oat_people, oat_report
from benchmarks.claims.report import RESULTS, Report
from vision.scanpath.metrics import multimatch, scanmatch
from vision.scanpath.objects import RegularGrid
from vision.scanpath.scenes import PAD

pytestmark = pytest.mark.usefixtures("one_thread")


def made_up(closed: float) -> kept.Measured:
    """Values of 40 scenes in which OAT closes so much of the gap, and all else is worse."""
    rng = np.random.default_rng(0)
    best = rng.normal(1.75, 0.1, 40)
    chain = best + rng.normal(0.45, 0.05, 40)
    found: kept.Measured = {("searcher itself", 0): best, ("Markov + target", 0): chain}
    for run in range(3):
        own = chain - closed * (chain - best) + rng.normal(0, 0.01, 40)
        found["OAT", run] = own
        for n, name in enumerate(("sinusoidal code", "learned code", "no target token", "no appearance"), 1):
            found[name, run] = own + 0.05 * n + rng.normal(0, 0.01, 40)
        found["OAT, crops shuffled", run] = own + 0.5
    return found


def test_the_gap_closed_is_a_share_of_the_way_to_the_searcher():
    assert oat_report.gap_closed(made_up(0.7)) == pytest.approx([0.7] * 3, abs=0.02)
    assert oat_report.gap_closed(made_up(0.7), "Markov + target") == [0]
    assert oat_report.gap_closed(made_up(0.7), "searcher itself") == [1]


@pytest.mark.parametrize(
    ("closed", "bar"), [(0.75, "shown"), (0.6, "not shown at this scale"), (0.4, "contradicted")]
)  # fmt: skip
def test_claims_have_the_direction_of_what_was_found(closed: float, bar: str):
    found = {claim.claim: claim for claim in oat_report.claims({"scenes": made_up(closed)}, (1, 2))}
    assert len(found) == 7
    verdicts = [claim.verdict for name, claim in found.items() if "60 %" not in name]
    assert verdicts == ["shown"] * 6
    (gap,) = (claim for name, claim in found.items() if "60 %" in name)
    assert gap.verdict == bar and f"{closed:.0%}"[:-2] in gap.ours
    for claim in found.values():
        assert claim.interval[0] <= claim.difference <= claim.interval[1] and claim.n == 40 and claim.seeds == (1, 2)


def test_more_is_better_of_scanmatch():
    rng = np.random.default_rng(0)
    values: kept.Measured = {
        ("nats: Markov + target", 0): rng.normal(3.2, 0.1, 20),
        ("ScanMatch: Markov + target", 0): rng.normal(0.2, 0.01, 20),
    }
    for run in range(3):
        values["nats: OAT", run] = values["nats: Markov + target", 0] + 0.2
        values["ScanMatch: OAT, sampled", run] = values["ScanMatch: Markov + target", 0] + 0.05
    nats, alike = oat_report.claims({"people": values}, (0, 0))
    assert nats.verdict == "contradicted" and nats.difference == pytest.approx(-0.2)
    assert alike.verdict == "shown" and alike.difference == pytest.approx(0.05)
    assert "better in 20 of 20 pictures" in alike.ours and "better in 0 of 20 pictures" in nats.ours


def test_values_survive_their_file(tmp_path: Path):
    values = made_up(0.7)
    kept.save(values, tmp_path / "values.csv")
    read = kept.load(tmp_path / "values.csv")
    assert list(read) == list(values)
    for key, own in values.items():
        np.testing.assert_allclose(read[key], own, rtol=1e-5)


def test_all_that_was_asked_has_to_hold_at_once():
    good = {"nats": 3.1, "ScanMatch": 0.25, "delta": 0.2, "steps": 12.0}
    assert oat_report.in_band(good)
    for change in ({"nats": 3.2}, {"ScanMatch": 0.2}, {"ScanMatch": 0.4}, {"delta": 0.31}, {"steps": 8}, {"steps": 19}):
        assert not oat_report.in_band(good | change)
    assert not oat_report.in_band({"nats": 3.1})
    table = oat_report.people_table({"OAT": good, "direct": {"SS": 0.2}})
    assert [row[-1] for row in table.rows] == ["yes", "no"] and table.rows[1][3] == "0.200" and table.rows[1][1] == ""
    several = oat_report.people_table({f"OAT, run {n}": good | {"delta": delta} for n, delta in enumerate((0.2, 0.4))})
    (row,) = several.rows
    assert row[0] == "OAT" and row[-1] == "1 of 2 runs" and row[-2] == "0.300 ± 1.271" and row[-3] == "12.0 ± 0.0"


def test_shuffled_crops_stay_in_their_scene():
    looks = torch.arange(24.0).view(24, 1, 1, 1)
    mixed = oat.shuffled(np.random.default_rng(0), looks, 3).view(3, 8)
    assert mixed.sort(1).values.tolist() == looks.view(3, 8).tolist() and not torch.equal(mixed, looks.view(3, 8))


def test_the_mean_over_scenes_is_the_nats_per_token():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 12)
    paths = np.where(np.arange(9) < lengths[:, None], 1, PAD)
    log_probs = np.where(np.arange(10) <= lengths[:, None], -rng.random((12, 10)), 0)
    by_scene = oat._by_scene(log_probs, paths, 4)
    assert by_scene.shape == (4,)
    assert by_scene.mean() == pytest.approx(-log_probs.sum() / (lengths + 1).sum())


def test_variants_differ_in_one_thing_each():
    configs = {name: oat.small(4, 9, **changes).to_dict() for name, changes in oat.VARIANTS.items()}
    for name, config in configs.items():
        differing = {key for key, value in config.items() if value != configs["OAT"][key]}
        assert len(differing) == (name != "OAT")


@pytest.fixture(scope="module")
def people() -> oat_people.People:
    """Four pictures of slightly different sizes, three searches each."""
    rng = np.random.default_rng(0)
    objects = [RegularGrid(6, 14).on((1400 + n, 600)) for n in range(4)]
    targets = rng.integers(84, size=4)
    paths, points = [], []
    for image in range(4):
        for _ in range(3):
            path = np.append(rng.integers(84, size=rng.integers(3, 9)), targets[image])
            paths.append(path)
            points.append(objects[image].centres[path] + rng.normal(0, 5, (len(path), 2)))
    return oat_people.People(objects, targets, paths, points, np.arange(4).repeat(3), np.ones(12, bool))


def test_mirroring_exchanges_left_and_right():
    grid = np.arange(84).reshape(6, 14)
    assert oat_people.mirror(grid).tolist() == grid[:, ::-1].tolist()


def test_simple_searchers_do_what_their_names_say(people: oat_people.People):
    made = oat_people.predictions(people, people)
    for name, prediction in made.items():
        assert len(prediction) == oat_people.SAMPLES and all(len(paths) == 12 for paths in prediction), name
        for paths in prediction[:3]:
            for path, target in zip(paths, people.wanted, strict=True):
                assert len(path) and 0 <= path.min() and path.max() < 84
                if "until" in name or "direct" in name:
                    assert path[-1] == target
                if "until" in name:
                    assert len(np.unique(path)) == len(path)
    lengths = {len(path) for path in people.paths}
    assert {len(path) for paths in made["random objects, people's lengths"] for path in paths} <= lengths
    assert made["line by line until the target"][0][0].tolist() == list(range(people.wanted[0] + 1))
    assert {len(path) for path in made["direct: centre, target, target"][0]} == {3}
    cells = people.cells
    for path in made["nearest unvisited until the target"][0]:
        for n in range(1, len(path)):
            distance = np.linalg.norm(cells - cells[path[n - 1]], axis=1)
            left = np.setdiff1d(np.arange(84), path[:n])
            assert distance[path[n]] == distance[left].min()


def test_people_are_compared_with_each_other_at_the_same_picture(people: oat_people.People):
    first, second = oat_people.others(people)
    assert [id(path) for path in first[:3]] == [id(people.paths[n]) for n in (1, 2, 0)]
    assert [id(path) for path in second[:3]] == [id(people.paths[n]) for n in (2, 0, 1)]
    scored = oat_people.score(people, [first, second], in_pixels=True)
    pairs = [scanmatch(people.paths[n], people.paths[0], people.cells) for n in (1, 2)]
    assert scored["ScanMatch"][0] == pytest.approx(np.mean(pairs))
    size = people.objects[0].size
    alike = [multimatch(people.points[n], people.points[0], size)["direction"] for n in (1, 2)]
    assert scored["MM direction"][0] == pytest.approx(np.mean(alike))
    assert scored["delta"][0] == pytest.approx(0, abs=1e-12)


def test_predictions_too_short_for_a_score_do_not_count(people: oat_people.People):
    long, short = people.paths, [path[-2:] for path in people.paths]
    scored = oat_people.score(people, [long, short])
    alone = oat_people.score(people, [long])
    np.testing.assert_allclose(scored["MM position"], alone["MM position"])
    assert (scored["SS"] < alone["SS"]).all() and (alone["SS"] == 1).all()


def test_a_model_is_trained_on_searches_and_sampled_for_each(people: oat_people.People):
    model = oat_people.fit_oat(people, seed=0, steps=3)
    assert model.appearance is None and model.config.max_length == max(map(len, people.paths))
    log_probs, hits = oat_people.tokens(people, model)
    assert (log_probs != 0).sum() == sum(len(path) + 1 for path in people.paths) and hits.shape == log_probs.shape
    drawn = oat_people.sampled(people, model, seed=0)
    assert [len(drawn["sampled"]), len(drawn["greedy"])] == [oat_people.SAMPLES, 1]
    assert all(len(paths) == 12 for paths in drawn["sampled"])
    every = [path.tolist() for paths in drawn["sampled"] for path in paths]
    assert len({tuple(path) for path in every}) > 100  # no sample is given twice
    again = oat_people.sampled(people, model, seed=0)["sampled"]
    assert [path.tolist() for paths in again for path in paths] == every


@pytest.mark.skipif(
    not os.environ.get("ATTNSUITE_STI"), reason="ATTNSUITE_STI does not name the folder of the STI data"
)
def test_searchers_on_real_data_score_as_was_measured_elsewhere():
    parts = oat_people.read_people(Path(os.environ["ATTNSUITE_STI"]))
    known, test = parts["train"], parts["test"]
    assert (len(known.paths), len(test.paths), len(test.objects)) == (390, 120, 20)
    human = oat_people.score(test, oat_people.others(test), in_pixels=True)
    means = {name: float(np.nanmean(values)) for name, values in human.items()}
    assert means == pytest.approx(
        {"SS": 0.214, "FED": 15.4, "ScanMatch": 0.358, "MM direction": 0.684, "MM position": 0.814, "found": 0.908,
         "steps": 13.3, "delta": 0}, abs=0.05,
    )  # fmt: skip
    reading = oat_people.score(test, [[np.arange(target + 1) for target in test.wanted]])
    assert np.mean(reading["ScanMatch"]) == pytest.approx(0.145, abs=0.001)
    for name, nats in (("uniform", 4.37), ("Markov displacement", 3.37), ("Markov + target", 3.26)):
        log_probs, _ = oat_people.tokens(test, oat_people.fitted_chains(known)[name])
        found = -log_probs.sum() / sum(len(path) + 1 for path in test.paths)
        assert found == pytest.approx(nats, abs=0.04)


def test_the_claims_of_oat_follow_from_the_values_that_are_kept():
    report = Report.load(RESULTS / "oat.json")
    names = ("scenes", "other grid", "people")
    measured = {name: kept.load(RESULTS / f"oat_{name.replace(' ', '_')}.csv") for name in names}
    assert report.claims == oat_report.claims(measured, (oat.TEST_SEED, oat.TEST_SEED))
    assert len(measured["scenes"]["OAT", 0]) == oat.TEST_SCENES and report.details["steps"] == oat.STEPS
    assert set(measured["scenes"]) >= {(name, seed) for name in oat.VARIANTS for seed in oat.SEEDS}
    assert report.tables[0] == oat_report.scenes_table(measured["scenes"])
    assert report.tables[2] == oat_report.people_table(report.details["scores"])
