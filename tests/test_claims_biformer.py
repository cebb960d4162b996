"""BiFormer's claim: the ways that are compared, how losses are judged, and that the claims follow from what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.claims import biformer as own
from benchmarks.claims import biformer_cost as cost
from benchmarks.claims.measured import Measured, load
from benchmarks.claims.paired import Comparison
from benchmarks.claims.report import RESULTS, Report
from benchmarks.claims.training import Pictures, train
from vision.biformer import BiFormer, BiLevelRoutingAttention


def _small(topk: int, way: str = cost.ROUTED) -> BiFormer:
    torch.manual_seed(0)
    return cost.rebuilt(BiFormer(depths=(1, 1), embed_dims=(16, 32), head_dim=8, n_win=4, topks=(topk, topk)), way)


def test_dense_attention_is_routed_attention_to_all_regions_with_the_same_weights():
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        everything = _small(16).double().eval()(x)
        for way in (cost.DENSE, cost.WRITTEN):
            dense = _small(2, way).double().eval()
            assert dense.state_dict().keys() == _small(16).state_dict().keys()
            torch.testing.assert_close(dense(x), everything, atol=1e-9, rtol=0)
        assert (_small(2).double().eval()(x) - everything).abs().max() > 1e-5


def test_a_region_that_attends_to_itself_sees_no_other():
    layer = BiLevelRoutingAttention(16, 2, n_win=4, topk=2, side_dwconv=0)
    model = BiFormer(depths=(1,), embed_dims=(16,), head_dim=8, n_win=4, topks=(2,), side_dwconv=0)
    alone = cost.rebuilt(model, cost.ITSELF).eval().stages[0].get_submodule("0.attn")
    x = torch.randn(1, 8, 8, 16)
    changed = x.clone()
    changed[0, 0, 0] += 1
    with torch.inference_mode():
        moved = (alone(changed) - alone(x)).abs().amax(-1)[0] > 0
        assert bool(moved[:2, :2].all()) and int(moved.sum()) == 4
        assert layer(x).shape == alone(x).shape


def test_rebuilding_keeps_mode_and_weights_and_refuses_what_it_does_not_know():
    model = _small(2).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = cost.rebuilt(model, cost.DENSE)
    assert after is model and not any(module.training for module in after.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())
    with pytest.raises(ValueError, match="way='sparse': expected one of routed"):
        cost.rebuilt(model, "sparse")


def test_multiply_adds_differ_by_the_scores_alone():
    chosen, regions, side = 2, 16, 16
    difference = cost.counted(_small(2, cost.DENSE).eval(), 64) - cost.counted(_small(2).eval(), 64)
    expected = 0
    for dim, tokens in ((16, side**2), (32, side**2 // 4)):
        dense, routed = 2 * tokens * tokens * dim, 2 * tokens * (chosen * tokens // regions) * dim
        expected += dense - routed - regions**2 * dim  # the choice costs too
    assert difference == expected


def test_peak_memory_is_read_in_a_process_of_its_own():
    held = cost.peak("biformer_nano", cost.WRITTEN, 288, 1)
    assert 2 < held * 2**20 / (1e9 * cost.score_gb(288)) < 3.5  # scores and their softmax
    assert cost.score_gb(288) == pytest.approx(4 * 5184**2 / 1e9)


def _found(difference: float, low: float, high: float) -> Comparison:
    return Comparison(100, difference, (low, high), 1, 1, 1.0)


def test_no_loss_is_shown_only_where_the_interval_leaves_the_margin_out():
    assert own.no_loss(_found(0.0, -0.009, 0.01), 0.01) == "shown"
    assert own.no_loss(_found(0.02, 0.01, 0.03), 0.01) == "shown"
    assert own.no_loss(_found(0.0, -0.02, 0.02), 0.01) == "not shown at this scale"
    assert own.no_loss(_found(-0.012, -0.02, -0.005), 0.01) == "not shown at this scale"
    assert own.no_loss(_found(-0.02, -0.03, -0.011), 0.01) == "contradicted"
    with pytest.raises(ValueError, match="margin=0"):
        own.no_loss(_found(0, 0, 0), 0)


def _costs(routed_mb: float, fused_mb: float, routed_ms: float) -> own.Costs:
    sizes = [str(size) for size in own.SIZES]
    rng = np.random.default_rng(0)

    def turns(mean: float) -> list[float]:
        return (mean * rng.uniform(0.98, 1.02, 9)).tolist()

    return {
        "macs": {own.ROUTED: dict.fromkeys(sizes, 1e9), own.DENSE: {s: int(s) * 1e8 for s in sizes}},
        "peak_mb": {
            own.ROUTED: dict.fromkeys(sizes, routed_mb),
            own.DENSE: dict.fromkeys(sizes, fused_mb),
            own.WRITTEN: {"512": 1000.0},
        },
        "ms": {own.ROUTED: {s: turns(routed_ms) for s in sizes}, own.DENSE: {s: turns(10) for s in sizes}},
    }


def _hits(rates: dict[str, float]) -> Measured:
    rng = np.random.default_rng(0)
    draws = rng.random(800)
    return {(way, seed): (draws < rate).astype(float) for way, rate in rates.items() for seed in own.SEEDS}


def test_claims_have_the_direction_of_what_was_found():
    nothing = "not shown at this scale"
    good = own.claims(_costs(100, 200, 5), _hits({own.ROUTED: 0.8, own.DENSE: 0.8, own.ITSELF: 0.7}))
    assert {claim.verdict for claim in good} == {"shown"}
    bad = own.claims(_costs(2000, 200, 20), _hits({own.ROUTED: 0.7, own.DENSE: 0.8, own.ITSELF: 0.7}))
    assert [claim.verdict for claim in bad] == ["shown", *["contradicted"] * 5, nothing]
    even = own.claims(_costs(198, 200, 10), _hits({own.ROUTED: 0.7, own.DENSE: 0.7, own.ITSELF: 0.7}))
    assert [claim.verdict for claim in even] == ["shown", "shown", nothing, nothing, nothing, "shown", nothing]
    for claim in (*good, *bad, *even):
        assert claim.interval[0] <= claim.difference <= claim.interval[1]


def test_the_trained_networks_start_from_the_same_weights_and_learn_from_turned_pictures():
    states = [own.network(way, 1).state_dict() for way in (own.ROUTED, own.DENSE, own.ITSELF)]
    assert all(torch.equal(tensor, state[name]) for state in states[1:] for name, tensor in states[0].items())
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(own.turned(images, generator)[0, 0].flatten().tolist()) for _ in range(100)}
    assert len(seen) == 8 and all(sorted(one) == list(range(16)) for one in seen)


def test_two_steps_of_training_move_the_weights_of_the_attention():
    pictures = own._drawn(7, 8)
    assert isinstance(pictures, Pictures) and pictures.images.shape == (8, 3, own.SIZE, own.SIZE)
    model = own.network(own.ROUTED, 0)
    before = model.state_dict()["stages.0.2.attn.qkv.qkv.weight"].clone()
    train(model, pictures, 2, 0, batch_size=4, augment=own.turned)
    assert not torch.equal(before, model.state_dict()["stages.0.2.attn.qkv.qkv.weight"])


def test_the_claims_follow_from_what_is_kept():
    report = Report.load(RESULTS / "biformer.json")
    measured = load(RESULTS / "biformer.csv")
    assert all(len(values) == own.TEST for values in measured.values())
    assert own.report(report.details["costs"], measured, report.machine) == report
