"""ELA's claim: it follows from the kept values, and networks differ in their attention alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import EcaModule, SEModule
from timm.layers.coord_attn import CoordAttn
from timm.models.resnet import BasicBlock

from benchmarks.claims import ela
from benchmarks.claims import measured as kept
from benchmarks.claims.layers import macs, parameters, started
from benchmarks.claims.report import RESULTS, Report, Table
from vision.ela import EfficientLocalAttention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.load(RESULTS / "ela.json")


def test_claims_and_tables_follow_from_the_kept_values(report: Report):
    measured = kept.load(RESULTS / "ela.csv")
    assert set(measured) == {(name, seed) for name in ela.LAYERS for seed in ela.SEEDS}
    assert all(len(values) == ela.TEST_PICTURES and set(values) <= {0, 1} for values in measured.values())
    again = ela.report(measured, Table(**report.details["costs"]), report.machine)
    assert (again.claims, again.tables, again.details) == (report.claims, report.tables, report.details)
    assert (again.protocol, again.command) == (report.protocol, report.command)


def test_the_table_of_costs_is_that_of_the_networks(report: Report):
    image = torch.zeros(1, 3, 48, 48)
    for (name, params, million, _), layer in zip(report.tables[1].rows, ela.LAYERS.values(), strict=True):
        model = started(ela.network, layer, 0).eval()
        assert params == f"{parameters(model) / 1e3:.1f} k" and million == f"{macs(model, image) / 1e6:.2f} M", name


def test_every_block_has_the_layer_of_its_name():
    kinds = {"SE": SEModule, "ECA": EcaModule, "CA": CoordAttn}
    for name, layer in ela.LAYERS.items():
        blocks = [m for m in ela.network(layer).modules() if isinstance(m, BasicBlock)]
        assert len(blocks) == 4
        for block in blocks:
            if name == "none":
                assert block.se is None
            elif name in kinds:
                assert isinstance(block.se, kinds[name])
            else:
                assert isinstance(block.se, EfficientLocalAttention)
                assert name.startswith(f"ELA-{block.se.variant.upper()}")
                assert block.se.has_skip == name.endswith(", skip")


def test_seeds_of_pictures_and_runs_are_apart():
    learnt, test = ela.drawn(ela.TRAIN_SEED, 64), ela.drawn(ela.TEST_SEED, 64)
    same = (learnt.images[:, None] == test.images[None]).flatten(2).all(2)
    assert not same.any() and len(ela.SEEDS) >= 3
    assert {pair.ours for pair in ela.PAIRS} == {"ELA-B"} and {pair.theirs for pair in ela.PAIRS} <= set(ela.LAYERS)


def test_networks_are_trained_and_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ela, "LAYERS", {name: ela.LAYERS[name] for name in ("none", "CA", "ELA-B")})
    learnt, test = ela.drawn(0, 128), ela.drawn(1, 20)
    measured = ela.measure(learnt, test, steps=2, seeds=(0, 1))
    again = ela.measure(learnt, test, steps=2, seeds=(0, 1))
    assert list(measured) == [(name, seed) for name in ("none", "CA", "ELA-B") for seed in (0, 1)]
    for key, values in measured.items():
        assert values.shape == (20,) and np.array_equal(values, again[key])
