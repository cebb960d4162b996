"""HiLo's claim: what is compared is what the protocol says, and what is printed is what was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.claims import hilo
from benchmarks.claims.measured import Measured, load
from benchmarks.claims.report import RESULTS, Report


def test_multiply_adds_are_those_of_the_equations_and_of_the_authors_comparison():
    n, c = 196, 768
    lo, hi = 640, 128  # 10 and 2 of 12 heads
    of_hi = 3 * n * c * hi + 2 * n * 4 * hi + n * hi * hi
    of_lo = n * c * lo + 2 * (n // 4) * c * lo + 2 * n * (n // 4) * lo + n * lo * lo
    counted = {layer: hilo.macs(layer, hilo.WIDE) for layer in hilo.LAYERS}
    assert counted[hilo.HILO] == of_hi + of_lo
    assert counted[hilo.WINDOW] == 4 * n * c * c + 2 * n * 49 * c
    assert counted[hilo.FULL] == 4 * n * c * c + 2 * n * n * c
    assert counted[hilo.REDUCED] == 2 * n * c * c + (n // 4) * (4 + 2) * c * c + 2 * n * (n // 4) * c
    published = {hilo.HILO: 298.3, hilo.WINDOW: 477.17, hilo.REDUCED: 419.56, hilo.FULL: 521.43}
    for layer, millions in published.items():
        assert counted[layer] / 1e6 == pytest.approx(millions, rel=5e-4)


@pytest.mark.parametrize("layer", hilo.LAYERS)
def test_layers_take_a_map_and_give_one_by_the_fused_kernel(layer: str):
    module = hilo.build(layer, 96)
    x = torch.randn(2, 14, 14, 96)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        assert module(x).shape == x.shape
    names = {event.key for event in profile.key_averages()}
    assert "aten::scaled_dot_product_attention" in names and "aten::softmax" not in names


def test_windows_do_not_see_each_other_and_full_attention_sees_all():
    x = torch.randn(1, 14, 14, 96)
    changed = x.clone()
    changed[0, 13, 13] += 1
    with torch.inference_mode():
        for layer in hilo.LAYERS:
            module = hilo.build(layer, 96)
            moved = (module(changed) - module(x)).abs().amax(-1)[0] > 1e-7
            assert bool(moved[7:, 7:].all())
            assert bool(moved[:7, :7].any()) == (layer != hilo.WINDOW)


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="expected one of HiLo, window"):
        hilo.build("linear", 96)


def _made_up(ratios: dict[str, float], setting: hilo.Setting, turns: int = 12) -> Measured:
    """Turns that drift by half, in which each layer takes so many times as long as HiLo, give or take."""
    rng = np.random.default_rng(0)
    measured: Measured = {}
    for seed in hilo.SEEDS:
        drift = np.linspace(10, 15, turns)
        for layer, ratio in ratios.items():
            measured[setting.column(layer), seed] = drift * ratio * rng.uniform(0.97, 1.03, turns)
    return measured


def test_verdicts_follow_the_ratio_of_each_turn_and_the_multiply_adds():
    ratios = {hilo.HILO: 1.0, hilo.WINDOW: 1.5, hilo.REDUCED: 1.0, hilo.FULL: 0.8}
    for setting in (hilo.SMALL, hilo.LARGE):
        claimed = [
            hilo.Faster("", "", setting, (hilo.WINDOW,)),
            hilo.Faster("", "", setting, (hilo.WINDOW,), 1.6),
            hilo.Faster("", "", setting, (hilo.REDUCED,)),
            hilo.Faster("", "", setting, (hilo.FULL,)),
            hilo.Faster("", "", setting, hilo.OTHERS),
        ]
        made = hilo.claims(_made_up(ratios, setting), claimed)
        nothing = "not shown at this scale"
        # On the large map HiLo has more multiply-adds than windows.
        first = "shown" if setting == hilo.SMALL else nothing
        assert [own.verdict for own in made] == [first, "contradicted", nothing, "contradicted", "contradicted"]
        assert made[0].difference == pytest.approx(0.5, abs=0.02) and made[0].n == 36
        for own in made:
            assert own.interval[0] <= own.difference <= own.interval[1]


def test_turns_are_measured_for_all_layers_and_seeds():
    setting = hilo.Setting(48, 14, 1)
    measured = hilo.measure(2, [setting])
    assert set(measured) == {(setting.column(layer), seed) for layer in hilo.LAYERS for seed in hilo.SEEDS}
    assert all(values.shape == (2,) and (values > 0).all() for values in measured.values())


def test_the_claims_follow_from_the_times_that_are_kept():
    report = Report.load(RESULTS / "hilo.json")
    measured = load(RESULTS / "hilo.csv")
    assert len(measured) == len(hilo.SETTINGS) * len(hilo.LAYERS) * len(hilo.SEEDS)
    assert hilo.report(measured, report.machine) == report
