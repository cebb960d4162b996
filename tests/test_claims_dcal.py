"""DCAL's claims: the values that are kept, what follows from them, and how the small networks are trained."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.claims import dcal
from benchmarks.claims.layers import parameters
from benchmarks.claims.measured import claims, load, runs
from benchmarks.claims.report import RESULTS, Report
from benchmarks.claims.training import scaled
from recipes.small_parts import Parts, pictures
from vision.dcal import DCAL, DCALCriterion
from vision.rollout import rollout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few() -> Parts:
    return pictures(5, 40, dcal.SIZE, dcal.LOOSE)


def test_all_variants_start_from_the_same_weights():
    plain = dcal.build(3, None).state_dict()
    dual = dcal.build(3, "both").state_dict()
    assert all(torch.equal(dual[name], weight) for name, weight in plain.items())
    assert not torch.equal(dcal.build(4, None).state_dict()["head.weight"], plain["head.weight"])


@pytest.mark.parametrize("name", [dcal.PLAIN, dcal.GLCA, dcal.PWCA, dcal.DUAL])
def test_two_steps_of_training_change_what_the_variant_trains(name: str, few: Parts):
    variant = dcal.VARIANTS[name]
    before = dcal.build(0, variant.inference).state_dict()
    model = dcal.trained(variant, 0, dcal.as_pictures(few), steps=2)
    changed = {key.split(".")[0] for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    has_glca = {"glca", "glca_norm", "glca_head"} & changed
    assert {"blocks", "head"} <= changed and bool(has_glca) == (name in (dcal.GLCA, dcal.DUAL))
    assert not model.training


@pytest.mark.parametrize("other", ["glca", "pwca"])
def test_two_branches_are_dcals_loss_without_the_third(other: str, few: Parts):
    model = dcal.build(0, "both")
    assert isinstance(model, DCAL)
    images, target = scaled(torch.from_numpy(few.images[:6])), torch.from_numpy(few.labels[:6])
    torch.manual_seed(0)  # of who is whose partner
    step = dcal.TwoBranches(other)(model, images, target)
    torch.manual_seed(0)
    parts = DCALCriterion()(model, images, target).parts
    assert step.parts["sa"].item() == pytest.approx(parts["sa"].item(), rel=1e-5)
    assert step.parts[other].item() == pytest.approx(parts[other].item(), rel=1e-5)
    assert step.loss.item() == pytest.approx((parts["sa"] + parts[other]).item() / 2, rel=1e-5)


def test_shares_of_attention_are_those_of_the_rollout(few: Parts):
    model = dcal.build(0, "both").eval()
    shares = dcal.attention_shares(model, few, batch_size=16)
    maps = rollout(model, scaled(torch.from_numpy(few.images[:5]))).numpy()
    for n, rolled in enumerate(maps):
        for what, mask in (("part", few.parts[n]), ("loose", few.loose[n])):
            covered = mask.reshape(8, 8, 8, 8).mean((1, 3)) >= 1 / 8
            assert covered.any()
            assert shares[what][n] == pytest.approx(rolled[covered].sum() / rolled.sum(), rel=1e-4)


def test_pwca_leaves_nothing_behind_that_is_asked(few: Parts):
    cost = dcal.costs(turns=1)
    assert cost[dcal.PWCA][:2] == cost[dcal.PLAIN][:2] and cost[dcal.GLCA][:2] == cost[dcal.DUAL][:2]
    plain, dual = dcal.build(0, None), dcal.build(0, "both")
    added = sum(parameters(dual.get_submodule(name)) for name in ("glca", "glca_norm", "glca_head"))
    assert cost[dcal.DUAL][0] - cost[dcal.PLAIN][0] == added == parameters(dual) - parameters(plain)
    asked = dcal.build(0, "sa").eval()
    images = scaled(torch.from_numpy(few.images[:4]))
    with torch.no_grad():
        torch.testing.assert_close(asked(images), nn.Module.eval(plain)(images))


def test_the_claims_of_dcal_follow_from_the_values_that_are_kept():
    report = Report.load(RESULTS / "dcal.json")
    measured = load(RESULTS / "dcal.csv")
    assert report.claims == claims(measured, dcal.PAIRS, (dcal.SEEDS[0], dcal.SEEDS[-1]))
    details = report.details
    assert report == dcal.report(measured, details["cost"], details["training seconds"], report.machine)
    for name in dcal.VARIANTS:
        values = runs(measured, f"accuracy: {name}")
        assert [len(run) for run in values] == [dcal.TEST] * len(dcal.SEEDS)
        assert set(np.unique(values)) <= {0.0, 1.0}
        row = next(row for row in report.tables[0].rows if row[0] == name)
        assert row[2] == ", ".join(f"{statistics.fmean(run):.1%}" for run in values)
