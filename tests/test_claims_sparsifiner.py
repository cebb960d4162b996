"""Sparsifiner's claim: it follows from the kept values; students begin where teacher and predictors ended."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import sparsifiner as counted
from benchmarks.claims import measured as kept
from benchmarks.claims import sparsifiner as script
from benchmarks.claims.layers import parameters
from benchmarks.claims.measured import Pair, within
from benchmarks.claims.report import RESULTS, Report, Table
from recipes.named_shapes import NAMES
from vision.sparsifiner import Sparsifiner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.load(RESULTS / "sparsifiner.json")


def test_claims_and_tables_follow_from_the_kept_values(report: Report):
    measured = kept.load(RESULTS / "sparsifiner.csv")
    assert set(measured) == {(name, seed) for name in (script.TEACHER, *script.STUDENTS) for seed in script.SEEDS}
    assert all(len(values) == script.TEST_PICTURES and set(values) <= {0, 1} for values in measured.values())
    again = script.report(measured, Table(**report.details["costs"]), report.machine)
    assert (again.claims, again.tables, again.details) == (report.claims, report.tables, report.details)
    assert (again.protocol, again.command) == (report.protocol, report.command)
    assert len(report.claims) == len(script.WITHIN) + len(script.PAIRS)


def test_counts_are_those_of_the_networks(report: Report):
    assert script.costs(torch.zeros(2, 3, 32, 32), 1).rows[0][1:4] == report.tables[1].rows[0][1:4]
    for row, rate in zip(report.tables[1].rows[1:], (0.3, 0.3, 0.1, 0.1), strict=True):
        model = script.network(rate).eval()
        model.set_attention_path("gather" if "gather" in row[0] else "masked")
        macs, whole = script.attention_macs(model)
        assert row[1] == f"{parameters(model) / 1e3:.1f} k"
        assert row[2].startswith(f"{macs / 1e6:.2f} M") and row[3] == f"{whole / 1e6:.2f} M"


@pytest.mark.parametrize("rate", [0.3, 0.1])
def test_attention_is_counted_as_the_formula_says(rate: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counted, "HEADS", 2)
    monkeypatch.setattr(counted, "HEAD_DIM", 32)
    model = script.network(rate).eval()
    model.set_attention_path("gather")
    macs, whole = script.attention_macs(model)
    layer = model.attention_layers()[0]
    expected = len(model.blocks) * counted.macs_by_formula(65, layer.budget(), layer.mask_predictor)
    assert macs == pytest.approx(expected, rel=0.03)
    model.set_attention_path("dense")
    dense = len(model.blocks) * 2 * 65**2 * 64
    assert script.attention_macs(model) == (dense, whole - macs + dense)


def test_networks_differ_in_their_keys_alone():
    states = [script.network(rate).state_dict() for rate in (None, 0.3, 0.1)]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    assert shapes[0] == shapes[1] == shapes[2]
    paths = [script.network(rate).attention_layers()[0].attention_path for rate in (None, 0.3)]
    assert paths == ["dense", "auto"]
    assert [script.network(rate).attention_layers()[0].budget() for rate in (0.3, 0.1)] == [20, 7]


def test_a_phase_trains_its_own_part_from_where_it_starts():
    torch.manual_seed(0)
    teacher, learnt = script.network(), script.drawn(0, 64)
    start = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for phase, rate in (("attn_recon", 0.1), ("cls_distill", 0.1), ("cls_distill", None)):
        model = script.taught(teacher, start, rate, phase, learnt, 0, 2)
        assert isinstance(model, Sparsifiner) and not model.training
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
        in_predictor = {".mask_predictor." in name for name in changed}
        assert in_predictor == {phase == "attn_recon"}
    assert all(torch.equal(tensor, start[name]) for name, tensor in teacher.state_dict().items())


def test_runs_are_asked_of_the_same_pictures():
    steps = dict.fromkeys(script.STEPS, 2)
    found = script.measure_run(1, steps, 64, 36)
    assert list(found) == [(name, 1) for name in (script.TEACHER, *script.STUDENTS)]
    assert all(values.shape == (36,) and set(values) <= {0, 1} for values in found.values())
    learnt, test = script.drawn(script.TRAIN_SEED, 72), script.drawn(script.TEST_SEED, 72)
    assert not (learnt.images[:, None] == test.images[None]).flatten(2).all(2).any()
    assert learnt.labels.bincount().tolist() == [2] * len(NAMES)


def _values(share: float, num: int, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(num) < share).astype(float)


@pytest.mark.parametrize(
    ("lost", "says"), [(0.0, "shown"), (0.1, "contradicted"), (0.02, "not shown at this scale"), (-0.1, "shown")]
)
def test_a_loss_is_held_against_its_margin(lost: float, says: str):
    rng = np.random.default_rng(0)
    theirs = [_values(0.8, 800, rng) for _ in range(3)]
    ours = [np.where(rng.random(800) < abs(lost), float(lost < 0), own) for own in theirs]
    measured = {("a", n): own for n, own in enumerate(ours)} | {("b", n): own for n, own in enumerate(theirs)}
    claim = within(measured, Pair("a is not much worse", "no figure", "a", "b"), 0.016, (0, 2))
    assert claim.verdict == says
    assert claim.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert claim.interval[0] <= claim.difference <= claim.interval[1]
    if says == "not shown at this scale":
        assert claim.p > 0.05 and "a loss of 1.6% has p" in claim.ours
    else:
        assert claim.p < 0.01
