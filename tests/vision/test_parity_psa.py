"""Polarized self-attention and its segmentation network against numbers of the authors' own code.

The parallel network is a hard case for rounding: its softmaxes saturate under the rule's weights, so that its logits
reach the hundreds. The stored `rounding` says how far fp32 lies from fp64 there.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from parity import rule
from torch.utils.flop_counter import FlopCounterMode

from vision.psa import PolarizedBasicBlock, PolarizedHRNetOCR, PolarizedSelfAttention, checkpoint_filter_fn, hrnet_ocr

OPERATORS = rule.load("psa_modules")
LAYOUTS: dict[str, Any] = {"p": "parallel", "s": "sequential"}
kinds = pytest.mark.parametrize("kind", list(LAYOUTS))


def layer(kind: str) -> PolarizedSelfAttention:
    golden = OPERATORS[f"PSA_{kind}"]
    psa = PolarizedSelfAttention(golden["channels"], LAYOUTS[kind])
    psa.load_state_dict(checkpoint_filter_fn(rule.state_dict(golden["state_dict"]), psa))
    return psa


@kinds
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layer_equals_the_authors(kind: str, memory_format: torch.memory_format):
    golden = OPERATORS[f"PSA_{kind}"]
    psa = layer(kind)
    assert sum(p.numel() for p in psa.parameters()) == golden["params"]
    x = rule.inputs(**golden["input"]).to(memory_format=memory_format)
    y = psa(x)
    rule.assert_matches(y, golden["output"], "output")
    assert y.sum().item() == pytest.approx(golden["sum"], rel=1e-4)
    assert y.norm().item() == pytest.approx(golden["l2"], rel=1e-5)
    with torch.inference_mode():
        rule.assert_matches(psa(x), golden["output"], "output in inference")
        channel, spatial = psa.masks(x)
    rule.assert_matches(x * channel, golden["channel_attention_branch_output"], "channel branch")
    rule.assert_matches(spatial, golden["spatial_mask"], "spatial mask")
    spatial_step = (x if kind == "p" else x * channel) * spatial
    rule.assert_matches(spatial_step, golden["spatial_attention_step_output"], "spatial step")


@kinds
def test_gradients_equal_the_authors(kind: str):
    golden = OPERATORS[f"PSA_{kind}"]
    psa = layer(kind)
    x = rule.inputs(**golden["input"]).requires_grad_()
    psa(x).square().mean().backward()
    assert x.grad is not None
    rule.assert_matches(x.grad, golden["grad_of_mean_square_wrt_input"], "gradient")
    norms = {name: p.grad.norm().item() for name, p in psa.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(golden["grad_l2_per_parameter"], rel=1e-4)


@kinds
def test_basic_block_equals_the_authors(kind: str):
    golden = OPERATORS[f"basic_block_{kind}"]
    block = PolarizedBasicBlock(golden["planes"], golden["planes"], layout=LAYOUTS[kind]).eval()
    block.load_state_dict(checkpoint_filter_fn(rule.state_dict(golden["state_dict"]), block))
    rule.assert_matches(block(rule.inputs(**golden["input"])), golden["output"], "block")


def official_shapes(model: PolarizedHRNetOCR) -> dict[str, list[int]]:
    """Names and shapes of the released state dict, whose norms in the attention have two axes more."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    return {name: [*shape, 1, 1] if "conv_up.1." in name else shape for name, shape in shapes.items()}


@lru_cache(maxsize=4)
def skeleton(kind: str, multi_scale: bool = True) -> Any:
    """The network without storage; building it takes seconds."""
    return timm.create_model("psa_hrnet_w48_ocr", layout=LAYOUTS[kind], multi_scale=multi_scale, device="meta").eval()


@lru_cache(maxsize=2)
def snapshot(kind: str) -> dict[str, Any]:
    """A file as the authors publish it, with the rule's weights."""
    shapes = official_shapes(skeleton(kind))
    return {"epoch": 174, "state_dict": {f"module.{k}": v for k, v in rule.state_dict(shapes).items()}}


def network(kind: str, multi_scale: bool = True) -> Any:
    model = copy.deepcopy(skeleton(kind, multi_scale))
    model.load_state_dict(hrnet_ocr.checkpoint_filter_fn(snapshot(kind), model), strict=True, assign=True)
    return model


@kinds
def test_names_and_shapes_are_those_of_the_released_file(kind: str):
    golden = rule.load(f"psa_hrnet_w48_ocr_{kind}")
    model = skeleton(kind)
    lines = [f"{name} {shape}" for name, shape in sorted(official_shapes(model).items())]
    assert len(lines) == golden["state_dict_entries"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == golden["state_dict_sha256"]
    assert sum(p.numel() for p in model.parameters()) == golden["params"]["multi_scale"]
    assert sum(p.numel() for p in skeleton(kind, False).parameters()) == golden["params"]["single_scale"]


@kinds
def test_multiply_adds_are_fewer_than_the_published_ones(kind: str):
    """The attention costs less than theirs, and so does the head: of all they need, the two are well below half."""
    golden = rule.load(f"psa_hrnet_w48_ocr_{kind}")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        skeleton(kind, False)(torch.empty(1, 3, 64, 128, device="meta"))
    macs = counter.get_total_flops() / 2
    assert 0.6 * golden["macs_64x128"] < macs < 0.75 * golden["macs_64x128_without_psa"]


@kinds
def test_single_scale_network_equals_the_authors(kind: str):
    golden = rule.load(f"psa_hrnet_w48_ocr_{kind}")["single_scale"]
    model = network(kind, False)
    seen: dict[str, Any] = {}
    for name in golden["points"]:
        if name != "pred":
            keep = lambda _m, _a, out, name=name: seen.update({name: out})  # noqa: E731
            model.get_submodule(name).register_forward_hook(keep)
    x = rule.inputs(**golden["input"])
    pred = model(x)
    assert pred.requires_grad, "with gradients on, no layer takes a short cut that is for inference alone"
    rule.assert_matches(pred, golden["points"]["pred"], "with gradients")
    with torch.inference_mode():
        seen["pred"] = model(x)
    assert set(seen) == set(golden["points"])
    for name, value in seen.items():
        rule.assert_matches(value, golden["points"][name], name)
    assert seen["pred"].norm().item() == pytest.approx(golden["pred_l2"], rel=1e-4)
    assert seen["pred"].sum().item() == pytest.approx(golden["pred_sum"], rel=1e-3)


@kinds
def test_multi_scale_network_equals_the_authors(kind: str):
    """Two scales as in training, and three as for the published accuracy."""
    goldens = rule.load(f"psa_hrnet_w48_ocr_{kind}")
    model = network(kind)
    golden = goldens["mscale_two_scale"]
    x = rule.inputs(**golden["input"])
    with torch.inference_mode():
        output = model(x, detailed=True)
        assert torch.equal(model(x), output.logits)
    seen: dict[str, Any] = {"pred": output.logits}
    for prediction in output.predictions:
        seen[f"pred_{round(10 * prediction.scale):02d}x"] = prediction.logits
        seen[f"attn_{round(10 * prediction.scale):02d}x"] = prediction.attention
    assert set(golden["points"]) < set(seen), "the attention at full size is not used and not stored"
    for name, point in golden["points"].items():
        rule.assert_matches(seen[name], point, f"two scales, {name}")

    golden = goldens["mscale_nscale"]
    x = rule.inputs(**golden["input"])
    assert list(model.scales) == golden["scales"]
    with torch.inference_mode():
        seen = {"pred": model.predict(x)}
        for scale in model.scales:
            prediction = model.predict_scale(x, scale)
            seen[f"pred_{round(100 * scale):03d}x"] = prediction.logits
            seen[f"attn_{round(100 * scale):03d}x"] = prediction.attention
    for name, point in golden["points"].items():
        rule.assert_matches(seen[name], point, f"three scales, {name}")
    assert seen["pred"].norm().item() == pytest.approx(golden["pred_l2"], rel=1e-4)


def test_a_foreign_entry_is_not_swallowed():
    model = copy.deepcopy(skeleton("p"))
    state_dict = {**snapshot("p")["state_dict"], "module.stranger.weight": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"stranger\.weight"):
        model.load_state_dict(hrnet_ocr.checkpoint_filter_fn({"state_dict": state_dict}, model), assign=True)
