"""Claims measured in small: the statistics, the protocol, and that what is printed is what was measured."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import astar as cost
from benchmarks.claims import astar, astar_report, paired
from benchmarks.claims.report import RESULTS, Claim, Report, Table, digests
from recipes.text_to_scene import HELD_OUT_PAIRS, build_pipeline

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 5), (16, 6), (3, 14), (71, 40)])
def test_the_sign_test_sums_all_outcomes_that_are_no_likelier(better: int, worse: int):
    n = better + worse
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(chance for chance in chances if chance <= chances[better] * (1 + 1e-9))
    assert paired.sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("hits", "trials"), [(0, 24), (12, 24), (150, 312), (312, 312)])
def test_the_interval_of_a_rate_is_where_the_score_test_does_not_reject(hits: int, trials: int):
    def score(share: float) -> float:
        return abs(hits / trials - share) / math.sqrt(share * (1 - share) / trials)

    low, high = paired.rate_interval(hits, trials)
    assert 0 <= low <= hits / trials <= high <= 1
    for bound in (low, high):
        assert bound in (0, 1) or score(bound) == pytest.approx(1.959964, abs=1e-4)


def test_holm_adjusts_to_the_level_at_which_the_steps_would_reject():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 12):
        p_values = list(rng.uniform(0, 0.1, count))
        adjusted = paired.holm(p_values)
        for level in (0.01, 0.05, 0.2, 0.5):
            rejected = set()
            for rank, index in enumerate(np.argsort(p_values)):
                if p_values[index] > level / (count - rank):
                    break
                rejected.add(index)
            assert rejected == {i for i, p in enumerate(adjusted) if p <= level}


def test_a_comparison_is_paired():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0, 10, 200)
    ours = theirs + rng.normal(0.3, 1, 200)  # far less than the spread between inputs
    found = paired.compare(list(ours), list(theirs))
    differences = ours - theirs
    means = sorted(rng.choice(differences, 200).mean() for _ in range(4000))
    assert found.difference == pytest.approx(differences.mean())
    assert found.interval == pytest.approx((means[100], means[3900]), abs=0.02)
    assert found.interval[0] > 0
    assert (found.better, found.worse) == ((differences > 0).sum(), (differences < 0).sum())
    assert found.p == paired.sign_test(found.better, found.worse)
    assert paired.compare(list(ours), list(theirs)) == found


def test_a_comparison_of_equals_says_nothing():
    found = paired.compare([1, 0, 1], [1, 0, 1])
    assert (found.difference, found.interval, found.better, found.worse, found.p) == (0, (0, 0), 0, 0, 1)


@pytest.mark.parametrize(("ours", "theirs"), [([1, 0], [1]), ([1], [0]), ([], [])])
def test_a_comparison_wants_the_same_inputs(ours: list[float], theirs: list[float]):
    with pytest.raises(ValueError, match="same inputs"):
        paired.compare(ours, theirs)


def test_verdicts():
    assert paired.verdict(0.1, 0.01) == "shown"
    assert paired.verdict(-0.1, 0.01) == "contradicted"
    assert paired.verdict(0.1, 0.05) == paired.verdict(0.0, 0.0) == "not shown at this scale"
    assert paired.verdict(0.009, 1e-9, least=0.01) == "not shown at this scale"


def _seeds(pictures: list[astar.Picture]) -> set[int]:
    return {picture.seed for picture in pictures}


def test_the_protocol_keeps_development_and_measurement_apart():
    screening, run_off = (astar.pictures("seen", *own) for own in (astar.SCREENING, astar.RUN_OFF))
    measured = {kind: astar.pictures(kind, *own) for kind, own in astar.MEASUREMENT.items()}
    every = [screening, run_off, *measured.values()]
    assert len(set.union(*map(_seeds, every))) == sum(map(len, every))
    assert max(_seeds(screening) | _seeds(run_off)) < 10_000 <= min(set.union(*map(_seeds, measured.values())))
    held_out = {frozenset(pair) for pair in HELD_OUT_PAIRS}
    assert not held_out & {frozenset(p.names) for p in screening + run_off + measured["seen"]}
    assert held_out == {frozenset(p.names) for p in measured["held out"]}
    for pictures in measured.values():
        assert len(pictures) >= 300
        assert len({sum(p.names == names for p in pictures) for names in {p.names for p in pictures}}) == 1
        assert {p.names for p in pictures} == {p.names[::-1] for p in pictures}
    with pytest.raises(ValueError, match="all count alike"):
        astar.pictures("seen", 25, 0)


def test_every_guided_method_is_offered_as_many_settings():
    settings = [astar.Setting(method, *own) for method in astar.METHODS for own in astar.GRID]
    assert len(set(settings)) == len(astar.METHODS) * len(astar.GRID)
    published = astar.Setting("Attend-and-Excite", 20.0, False, True).guidance()
    assert (published.step_size, published.refinement, published.keep_padding) == (
        20.0,
        {0: 0.05, 3: 0.5, 6: 0.8},
        True,
    )
    assert published.steps == 8 and published.weighted == {"attend_and_excite": 1.0}
    assert astar.Setting("A-STAR", 20.0, True, False).guidance() == astar.Guidance()


def test_the_best_setting_has_most_hits_over_both_rounds_and_of_equals_the_first():
    a, b, c, d, e = (astar.Setting("A-STAR", *own) for own in astar.GRID[:5])
    screened = [astar.Tried(s, (hits, 24)) for s, hits in ((a, 3), (b, 9), (c, 8), (d, 8), (e, 8))]
    assert [own.setting for own in astar.second_round(screened)] == [b, c, d]
    after = [
        astar.Tried(a, (3, 24)),
        astar.Tried(b, (9, 24), (40, 96)),
        astar.Tried(c, (8, 24), (42, 96)),
        astar.Tried(d, (8, 24), (42, 96)),
    ]
    assert astar.best(after) == {"plain": astar.Setting("plain"), "A-STAR": c}


@pytest.fixture(scope="module")
def pipe() -> astar.AStarStableDiffusionPipeline:
    """The model as it is before training: the same parts, random weights."""
    torch.manual_seed(0)
    parts = {name: part for name, part in build_pipeline().components.items() if name != "image_encoder"}
    pipe = astar.AStarStableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_is_seen_of_the_maps_is_what_the_pipeline_itself_reports(pipe: Any):
    setting = astar.Setting("A-STAR", 20.0, True, False)
    batch = astar.pictures("seen", *astar.SCREENING)[4:6]
    drawn = astar.draw(pipe, setting, batch)
    reported = pipe(**astar._arguments(setting, batch), return_attention=True).losses
    assert [o.overlap for o in drawn] == pytest.approx(reported["segregation"].mean(0).tolist(), abs=1e-6)
    assert [o.retention for o in drawn] == pytest.approx((reported["retention"][1:].mean(0) / 2).tolist(), abs=1e-6)
    one_by_one = [o for picture in batch for o in astar.draw(pipe, setting, [picture])]
    assert [o.overlap for o in drawn] == pytest.approx([o.overlap for o in one_by_one], abs=1e-5)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of the pipeline of diffusers
def test_a_loss_pass_through_the_whole_unet_changes_only_how_long_it_takes(pipe: Any):
    calls: list[int] = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda *_: calls.append(1))
    ways = cost.ways(pipe, steps=2)
    early, whole, ours, theirs = (
        (ways[name]().images, len(calls))  # type: ignore[attr-defined]
        for name in ("A-STAR", "A-STAR, whole UNet", "Attend-and-Excite, ours", cost.REFERENCE)
    )
    handle.remove()
    assert (early[1], whole[1], ours[1], theirs[1]) == (2, 6, 8, 12)
    assert torch.equal(early[0], whole[0])
    assert torch.allclose(ours[0], theirs[0], atol=1e-4)


def _results(rng: np.random.Generator, rates: dict[str, float]) -> astar_report.Results:
    """Made up, with these shares of pictures that show both."""
    pictures = [p for kind in astar.PAIRS for p in astar.pictures(kind, 96, 10_000 + 10_000 * (kind != "seen"))]
    return {
        method: {p: astar.Outcome(2 if rng.random() < rate else 1, rate / 3, 1 - rate / 3) for p in pictures}
        for method, rate in rates.items()
    }


RATES = {"plain": 0.1, "Attend-and-Excite": 0.99, "segregation": 0.6, "retention": 0.6, "A-STAR": 0.6}


def test_claims_have_the_direction_of_what_was_found():
    claims = astar_report.claims(_results(np.random.default_rng(0), RATES))
    verdicts = {claim.claim.removeprefix("A-STAR "): claim.verdict for claim in claims if "seen" in claim.claim}
    assert verdicts == {
        "shows both subjects more often than the plain model (pairs seen)": "shown",
        "shows both subjects more often than Attend-and-Excite (pairs seen)": "contradicted",
        "Both losses show both subjects more often than segregation alone (pairs seen)": "not shown at this scale",
        "Both losses show both subjects more often than retention alone (pairs seen)": "not shown at this scale",
        "makes the subjects' maps overlap less (pairs seen)": "contradicted",  # made up to rise
        "keeps maps where they were a step before (pairs seen)": "shown",
    }
    for claim in claims:
        assert claim.interval[0] <= claim.difference <= claim.interval[1]
        assert claim.n == len(range(claim.seeds[0], claim.seeds[1] + 1))


def test_outcomes_survive_their_file(tmp_path: Path):
    results = _results(np.random.default_rng(0), {"plain": 0.25, "A-STAR": 0.5})
    astar_report.save_outcomes(results, tmp_path / "outcomes.csv")
    read = astar_report.load_outcomes(tmp_path / "outcomes.csv")
    assert {m: list(own) for m, own in read.items()} == {m: list(own) for m, own in results.items()}
    for method, picture in itertools.product(results, results["plain"]):
        before, after = results[method][picture], read[method][picture]
        assert after.found == before.found
        assert (after.overlap, after.retention) == pytest.approx((before.overlap, before.retention), abs=1e-5)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables  # type: ignore[import-not-found]

    return tables


def test_a_report_is_printed_as_it_was_saved(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claim = Claim(
        "It helps", "76.1 %", "70 % → 71 %", "not shown at this scale", 300, (10_000, 10_299), 0.01, (-1, 1), 1
    )
    report = Report(
        "X", "Y, 2020", "python x.py", "As written.", {"cpu": "c", "date": "d", "versions": {"torch": "2"}}, [claim],
        [Table("Times", ["a"], [["b"]])], {"k": [1]},
    )  # fmt: skip
    monkeypatch.setattr(tables, "CLAIMS", tmp_path)
    assert "## Claims" not in tables.results_page()
    report.save(tmp_path / "x.json")
    assert Report.load(tmp_path / "x.json") == report
    page = tables.results_page()
    assert "| It helps | 76.1 % | 70 % → 71 % | not shown at this scale | `python x.py` |" in page
    assert "Seeds 10000 to 10299. Measured on c, d, torch 2." in page
    assert "Times:\n\n| a |\n| --- |\n| b |\n" in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_measured_claim_is_complete_and_printed(path: Path):
    report = Report.load(path)
    printed = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert report.claims and {"cpu", "date", "versions"} <= set(report.machine)
    for claim in report.claims:
        assert claim.verdict in paired.VERDICTS
        row = f"| {claim.claim} | {claim.published} | {claim.ours} | {claim.verdict} | `{report.command}` |"
        assert row in printed


def test_the_claims_of_astar_follow_from_its_pictures_and_are_of_the_model_that_ships():
    report = Report.load(RESULTS / "astar.json")
    results = astar_report.load_outcomes(RESULTS / "astar.csv")
    asked = [p for kind, own in astar.MEASUREMENT.items() for p in astar.pictures(kind, *own)]
    assert {method: list(own) for method, own in results.items()} == {method: asked for method in astar.METHODS}
    assert report.claims == astar_report.claims(results)
    assert report.details["weights"] == digests(astar.MODEL)
    tried = [astar._tried(own) for own in report.details["tried"]]
    assert {m: astar.Setting(**own) for m, own in report.details["chosen"].items()} == astar.best(tried)
