"""TAP's and ADL's claims: the values that are kept, what follows from them, and how the small networks are trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.claims import measured as kept
from benchmarks.claims import tap
from benchmarks.claims.layers import parameters
from benchmarks.claims.report import RESULTS, Report
from benchmarks.claims.training import Pictures, scaled
from vision.attention import record_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few() -> Pictures:
    return tap.drawn(5, 40)


def test_all_variants_start_from_the_same_weights():
    plain, pooled = tap.build(3, 1), tap.build(3, tap.SCALES)
    weights = pooled.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in plain.state_dict().items())
    added = parameters(pooled) - parameters(plain)
    C, K = tap.DIM, tap.SCALES
    assert added == tap.DEPTH * (9 * C * K + 9 * K * K + 2 * K)


@pytest.mark.parametrize("name", tap.VARIANTS)
def test_two_steps_of_training_run_and_change_the_network(name: str, few: Pictures):
    scales, _ = tap.VARIANTS[name]
    before, model = tap.build(0, scales).state_dict(), tap.trained(name, 0, few, steps=2)
    changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    assert {"blocks.0.attn.q.weight", "head.weight"} <= changed and not model.training
    assert any("dilation_predictor" in key for key in changed) == (scales > 1)


def test_corruptions_are_in_order_and_the_same_again(few: Pictures):
    fewer = Pictures(few.images[:3], few.labels[:3])
    worse, again = tap.corrupted(fewer), tap.corrupted(fewer)
    sets = len(tap.CORRUPTIONS) * len(tap.SEVERITIES)
    assert len(worse) == 3 * sets and torch.equal(worse.images, again.images)
    assert worse.labels.tolist() == fewer.labels.tolist() * sets
    by_set = worse.images.view(len(tap.CORRUPTIONS), len(tap.SEVERITIES), *fewer.images.shape).float()
    off = (by_set - fewer.images).abs().mean((2, 3, 4, 5))
    assert (off > 0.5).all() and (off[:, 1] > off[:, 0]).sum() >= len(tap.CORRUPTIONS) - 1
    pixels = worse.images.flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels)  # no two are alike


def test_cosines_are_those_of_every_two_rows(few: Pictures):
    model = tap.build(0, tap.SCALES).eval()
    found = tap.cosines(model, few, batch_size=16)
    with torch.no_grad(), record_attention(model.blocks) as layers:
        model(scaled(few.images[:4]))
    for n in range(4):
        each = []
        for own in layers.values():
            rows = own[0].attn[n].mean(0).double().numpy()
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            each.append((rows @ rows.T)[~np.eye(len(rows), dtype=bool)].mean())
        assert len(each) == tap.DEPTH and found[n] == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "verdict"), [(0.0, "shown"), (0.01, "not shown at this scale"), (0.05, "contradicted")]
)
def test_accuracy_is_kept_where_the_interval_leaves_out_a_loss_of_the_margin(loss: float, verdict: str):
    rng = np.random.default_rng(0)
    clean: kept.Measured = {}
    for seed in tap.SEEDS:
        own = rng.random(1000) < 0.97
        clean[f"clean: {tap.PLAIN}", seed] = own.astype(float)
        clean[f"clean: {tap.BOTH}", seed] = (own & (rng.random(1000) >= loss)).astype(float)
    measured = {(f"{what}: {name}", seed): rng.random(50) for what in ("corrupted", "cosine")
                for name in tap.VARIANTS for seed in tap.SEEDS}  # fmt: skip
    *others, found = tap.claims(measured, clean)
    assert len(others) == len(tap.PAIRS) and found.verdict == verdict
    assert found.difference == pytest.approx(-0.97 * loss, abs=0.006)
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_the_claims_of_tap_follow_from_the_values_that_are_kept():
    report = Report.load(RESULTS / "tap.json")
    measured, clean = kept.load(RESULTS / "tap.csv"), kept.load(RESULTS / "tap_clean.csv")
    assert report.claims == tap.claims(measured, clean)
    details = report.details
    assert report == tap.report(measured, clean, details["cost"], details["variants"], report.machine)
    for name in tap.VARIANTS:
        for seed, own in zip(tap.SEEDS, details["variants"][name]["by corruption"], strict=True):
            told = measured[f"corrupted: {name}", seed]
            assert len(told) == tap.CORRUPTED and told.mean() == pytest.approx(np.mean(own), abs=1e-6)
            assert len(clean[f"clean: {name}", seed]) == tap.TEST
            assert (measured[f"cosine: {name}", seed] <= 1 + 1e-6).all()
