"""PSA's claim: it follows from the kept values; heat maps are what they say, and networks differ in one layer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.layers import SEModule
from timm.models.resnet import BasicBlock

from benchmarks.claims import measured as kept
from benchmarks.claims import psa
from benchmarks.claims.layers import macs, parameters, started
from benchmarks.claims.report import RESULTS, Report, Table
from benchmarks.claims.training import logits, scaled, train
from vision.psa import PolarizedSelfAttention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.load(RESULTS / "psa.json")


def test_claims_and_tables_follow_from_the_kept_values(report: Report):
    measured = kept.load(RESULTS / "psa.csv")
    scores = ("joints: ", "maps: ")
    assert set(measured) == {(score + name, seed) for score in scores for name in psa.LAYERS for seed in psa.SEEDS}
    for (name, _), values in measured.items():
        assert len(values) == psa.TEST_PICTURES and values.min() >= 0
        if name.startswith("joints"):  # shares of eleven, as the file keeps them
            np.testing.assert_allclose(values * 11, np.rint(values * 11), atol=1e-4)
    again = psa.report(measured, Table(**report.details["costs"]), report.machine)
    assert (again.claims, again.tables, again.details) == (report.claims, report.tables, report.details)
    assert (again.protocol, again.command) == (report.protocol, report.command)


def test_the_table_of_costs_is_that_of_the_networks(report: Report):
    image = torch.zeros(1, 3, 48, 48)
    for (name, params, million, _), layer in zip(report.tables[2].rows, psa.LAYERS.values(), strict=True):
        model = started(psa.Network, layer, 0).eval()
        assert params == f"{parameters(model) / 1e3:.1f} k" and million == f"{macs(model, image) / 1e6:.2f} M", name


def test_maps_are_gaussians_around_the_joints():
    joints = torch.tensor([[[5.0, 9.0], [0.0, 0.0]]])  # pixels; a cell is two of them
    maps = psa.heat_maps(joints, (6, 8))
    assert maps.shape == (1, 2, 6, 8)
    for row, column in ((4, 2), (0, 7), (3, 3)):
        x, y = (column + 0.5) * 2 - 5, (row + 0.5) * 2 - 9
        assert maps[0, 0, row, column].item() == pytest.approx(math.exp(-(x * x + y * y) / (2 * 2**2)), rel=1e-5)
    assert maps[0, 0].argmax().item() == 4 * 8 + 2 and maps[0, 0, 4, 2].item() == pytest.approx(1)


def test_peaks_of_the_true_maps_are_the_joints():
    joints = 2 + torch.rand(20, 11, 2, generator=torch.Generator().manual_seed(0)) * 44  # none in a cell at an edge
    found = psa.peaks(psa.heat_maps(joints, (24, 24)))
    assert (found - joints).abs().max() <= 0.5 + 1e-5  # a quarter of a cell, 0.5 pixels; 1 without the shift
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., 3, 0] = 1
    corner[..., 3, 1] = corner[..., 2, 0] = 0.5
    assert psa.peaks(corner).tolist() == [[[1.0, 7.0]]]  # at an edge there is one neighbour only: no shift
    inner = torch.zeros(1, 1, 4, 4)
    inner[..., 2, 1] = 1
    assert psa.peaks(inner).tolist() == [[[3.0, 5.0]]]
    inner[..., 2, 2] = inner[..., 1, 1] = 0.5
    assert psa.peaks(inner).tolist() == [[[3.5, 4.5]]]


def test_the_loss_is_zero_for_the_true_maps():
    pictures = psa.drawn(0, 4)
    maps = psa.heat_maps(pictures.labels, (24, 24))

    class Knows(torch.nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return maps + 0.1

    loss = psa.heat_map_loss(Knows(), scaled(pictures.images), pictures.labels).loss
    assert loss.item() == pytest.approx(0.01 * 24 * 24, rel=1e-4)


def test_every_block_has_the_layer_of_its_name_between_its_convolutions():
    for name, layer in psa.LAYERS.items():
        blocks = list(psa.Network(layer).blocks)
        assert len(blocks) == 4
        for block in blocks:
            assert isinstance(block, BasicBlock) and block.se is None
            if name.startswith("PSA"):
                assert isinstance(block.aa, PolarizedSelfAttention)
                assert (block.aa.layout == "parallel") == ("(p)" in name)
                assert (block.aa.form == "paper") == name.endswith("paper's form")
            else:
                assert isinstance(block.aa, SEModule if name == "SE" else torch.nn.Identity)


def test_networks_are_trained_and_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psa, "LAYERS", {name: psa.LAYERS[name] for name in ("none", "PSA(s)")})
    learnt, test = psa.drawn(0, 64), psa.drawn(1, 6)
    measured = psa.measure(learnt, test, steps=2, seeds=(0, 1))
    assert len(measured) == 8
    model = started(psa.Network, psa.LAYERS["PSA(s)"], 1)
    train(model, learnt, 2, 1, psa.heat_map_loss, psa.BATCH_SIZE, psa.LEARNING_RATE)
    maps = logits(model, test)
    errors = (maps - psa.heat_maps(test.labels, (24, 24))).square().mean((1, 2, 3)) * 1e3
    np.testing.assert_allclose(measured["maps: PSA(s)", 1], errors, rtol=1e-5)
    near = (psa.peaks(maps) - test.labels).norm(dim=2) <= 1.5
    np.testing.assert_allclose(measured["joints: PSA(s)", 1], near.double().mean(1))
