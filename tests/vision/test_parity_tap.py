"""TAP, ADL, FAN and RVT against numbers of the authors' own code, under weights that anybody can make again.

The authors' rounding is known at the logits; at the points before them that of our own network (fp32 against fp64)
stands in for it.
"""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from parity import rule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vision import fan, rvt
from vision.attention import attention_layers, record_attention
from vision.fan import segmentation
from vision.tap import ADLCriterion, attention_diversification_loss

HYBRIDS = ["tiny_8", "small_12", "base_16", "large_16"]
TAP = [
    *(f"tap_fan_{size}_p4_hybrid" for size in HYBRIDS),
    *(f"tap_fan_{size}_p16_224" for size in ("tiny_12", "small_12", "base_18", "large_24")),
    *(f"tap_rvt_{size}{plus}" for size in ("tiny", "small", "base") for plus in ("", "_plus")),
]
PLAIN = [f"fan_{size}_p4_hybrid" for size in HYBRIDS]
TRAINED = ["tap_fan_tiny_8_p4_hybrid", "tap_fan_tiny_12_p16_224", "tap_rvt_tiny_plus"]


@lru_cache(maxsize=1)
def weights_for(name: str) -> dict[str, Tensor]:
    return rule.state_dict(rule.load(name)["state_dict"])


def official(name: str) -> dict[str, Tensor]:
    """A filled state dict under the authors' names; those of plain networks are part of those with TAP."""
    whole = weights_for(f"tap_{name.removeprefix('tap_')}")
    return {entry: value for entry, value in whole.items() if name.startswith("tap_") or ".dilation_" not in entry}


def converted(name: str, model: nn.Module) -> dict[str, Tensor]:
    """As from a published file: FAN's is a training checkpoint of timm's, RVT's one of DeiT's."""
    if "rvt" in name:
        return rvt.checkpoint_filter_fn({"model": official(name), "epoch": 299}, model)
    wrapped = {f"module.{entry}": value for entry, value in official(name).items()}
    return fan.checkpoint_filter_fn({"epoch": 299, "state_dict": wrapped, "state_dict_ema": {}}, model)


def build(name: str) -> Any:
    model = timm.create_model(name, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(converted(name, model), strict=True)
    return model


@pytest.fixture(scope="module", params=TAP)
def network(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Name and network, for all tests of it in a row: most of the time goes into drawing weights."""
    return request.param, build(request.param)


hybrids = pytest.mark.parametrize("network", [f"tap_{name}" for name in PLAIN], indirect=True, scope="module")


def assert_logits_match(logits: Tensor, golden: dict[str, Any]) -> None:
    assert list(logits.shape) == golden["shape"]
    assert logits.argmax(1).tolist() == golden["argmax"]
    atol = 30 * golden["rounding"]
    torch.testing.assert_close(logits[0, :16], torch.tensor(golden["first16"]), rtol=1e-3, atol=atol)
    logits = logits.double()
    assert logits.sum().item() == pytest.approx(golden["sum"], rel=1e-3, abs=atol * logits.numel() ** 0.5)
    assert logits.norm().item() == pytest.approx(golden["l2"], rel=1e-4)


def module_of(model: nn.Module, point: str) -> nn.Module:
    """The module whose output a file calls by the authors' name of a point."""
    if isinstance(model, rvt.RVT):
        stage = point.rpartition(".")[0] == "transformers"
        point = f"{point}.blocks" if stage else point.replace("norm", "fc_norm") if point == "norm" else point
        if stage:
            return list(model.get_submodule(point).children())[-1]
    return model.get_submodule(f"{point}.proj" if point.endswith("dilation_predictor") else point)


def as_the_authors(out: Tensor, point: str, shape: list[int]) -> Tensor:
    """Ours in the authors' layout, `[B, C, H, W]` or `[B, N, C]`."""
    if point.endswith("dilation_predictor"):
        return out.softmax(1).permute(0, 2, 3, 1).unsqueeze(1)
    if out.ndim == 3 and len(shape) == 4:
        return out.mT.reshape(shape)
    if out.ndim == 4 and len(shape) == 4 and "transformers" in point:
        return out.permute(0, 3, 1, 2)
    return out.flatten(1, 2) if out.ndim > len(shape) else out


@torch.inference_mode()
def test_network_equals_the_authors(network: tuple[str, Any]):
    name, model = network
    golden = rule.load(name)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    seen: dict[str, Tensor] = {}
    points = [point for point in golden["features"] if not point.endswith("_attn")]
    with ExitStack() as hooks:
        for point in points:
            hook = module_of(model, point).register_forward_hook(
                lambda _m, _a, out, point=point: seen.update({point: out})
            )
            hooks.callback(hook.remove)
        logits = model(rule.inputs(**golden["input"]))
    assert_logits_match(logits, golden["logits"])
    for point in points:
        expected = golden["features"][point]
        rule.assert_matches(as_the_authors(seen[point], point, expected["shape"]), expected, f"{name}, {point}")


def test_attention_and_training_path_equal_the_authors(network: tuple[str, Any]):
    """With gradients on, no layer takes a short cut that is for inference alone; attention is that of every block."""
    name, model = network
    golden = rule.load(name)
    with record_attention(model) as layers:
        logits = model(rule.inputs(**golden["input"]))
    assert_logits_match(logits.detach(), golden["logits"])
    mixing = [maps for layer, maps in layers.items() if not layer.startswith("cls_attn_blocks")]
    assert len(mixing) == golden["attention_layers"]
    for maps, key in ((mixing[0], "first_attn"), (mixing[-1], "last_attn")):
        assert maps[0].key_grid[0] * maps[0].key_grid[1] == maps[0].attn.shape[-1]
        rule.assert_matches(maps[0].attn, golden["features"][key], f"{name}, {key}")


@hybrids
@torch.inference_mode()
def test_network_without_pooling_equals_the_authors(network: tuple[str, Any]):
    name = network[0].removeprefix("tap_")
    golden = rule.load(name)
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert_logits_match(model(rule.inputs(**golden["input"])), golden["logits"])


@hybrids
@torch.inference_mode()
def test_biased_norms_give_what_the_authors_code_gives_with_them(network: tuple[str, Any]):
    """The one ordinary norm is the stem's, all others are unbiased: with ordinary ones throughout logits are others."""
    name, model = network
    golden = rule.load(name)
    backbone = copy.deepcopy(model.patch_embed.backbone)
    norms = [m for m in backbone.modules() if isinstance(m, LayerNorm2d)]
    assert [isinstance(m, fan.LayerNorm2dUnbiased) for m in norms] == [False] + [True] * (len(norms) - 1)
    for norm in norms[1:]:
        norm.__class__ = LayerNorm2d
    model = copy.copy(model)
    model._modules = {**model._modules, "patch_embed": copy.copy(model.patch_embed)}
    model.patch_embed._modules = {**model.patch_embed._modules, "backbone": backbone}
    logits = model(rule.inputs(**golden["input"]))
    expected = torch.tensor(golden["logits_of_biased_norms_first16"])
    torch.testing.assert_close(logits[0, :16], expected, rtol=1e-3, atol=30 * golden["logits"]["rounding"])
    assert (expected - torch.tensor(golden["logits"]["first16"])).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*TAP, *PLAIN])
def test_multiply_adds_are_the_authors(name: str):
    """Averages included, which cost their code none; it has one product the size of attention more without TAP."""
    model = timm.create_model(name, device="meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(rule.load(name)["macs"], rel=0.01)


@pytest.mark.parametrize("name", TRAINED)
def test_training_step_equals_the_authors(name: str):
    """Logits, both losses, gradients and running statistics of a batch with soft targets."""
    golden = rule.load(name)["training"]
    model = build(name).train()
    x = rule.inputs(**golden["input"])
    target = (3 * rule.inputs((len(x), 1000), 77)).softmax(-1)
    layers = [layer for layer in attention_layers(model) if not layer.startswith("cls_attn_blocks")]
    with record_attention(model) as recorded:
        logits = model(x)
    attns = [recorded[layer][0].attn for layer in layers]
    assert_logits_match(logits.detach(), golden["logits"])
    classification = F.cross_entropy(logits, target)
    assert classification.item() == pytest.approx(golden["soft_target_ce"], rel=1e-4)
    losses = [attention_diversification_loss(attns, threshold) for threshold in (2.0, 1.0)]
    assert losses[0].item() == pytest.approx(golden["adl_threshold_2"], rel=1e-3, abs=1e-6)
    assert losses[1].item() == pytest.approx(golden["adl_threshold_1"], rel=1e-3)
    (classification + losses[0] + losses[1]).backward()
    for part, norm in golden["gradient_norms"].items():
        grads = [p.grad for entry, p in model.named_parameters() if part in entry and p.grad is not None]
        assert torch.cat([g.flatten() for g in grads]).norm().item() == pytest.approx(norm, rel=1e-3), part
    state = model.state_dict()
    for entry, values in golden["running_stats"].items():
        torch.testing.assert_close(state[entry], torch.tensor(values), rtol=1e-3, atol=1e-5, msg=entry)


@pytest.mark.parametrize("name", TRAINED)
def test_criterion_gives_the_authors_losses(name: str):
    golden = rule.load(name)["training"]
    model = build(name).train()
    x = rule.inputs(**golden["input"])
    step = ADLCriterion(weight=3.0, threshold=1.0)(model, x, (3 * rule.inputs((len(x), 1000), 77)).softmax(-1))
    assert step.parts["task"].item() == pytest.approx(golden["soft_target_ce"], rel=1e-4)
    assert step.parts["diversification"].item() == pytest.approx(golden["adl_threshold_1"], rel=1e-3)
    assert step.loss.item() == pytest.approx(golden["soft_target_ce"] + 3 * golden["adl_threshold_1"], rel=1e-3)


@pytest.mark.parametrize("case", rule.load("adl_loss"), ids=lambda case: "x".join(map(str, case["shape"])))
def test_diversification_loss_equals_the_authors(case: dict[str, Any]):
    """Value and gradient; for a batch of one the authors' code has another axis, and 0 comes out."""
    B, heads, N, _ = case["shape"]
    seeds = range(case["seed"], case["seed"] + case["layers"])
    attns = [
        (rule.inputs(case["shape"], s) + 2 * rule.inputs((B, heads, 1, N), s + 1000)).softmax(-1).requires_grad_()
        for s in seeds
    ]
    loss = attention_diversification_loss(attns, case["threshold"])
    if B == 1:
        assert case["loss"] == 0 and loss > 0.5
        return
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    (grad,) = torch.autograd.grad(loss, attns[:1])
    rule.assert_matches(grad, case["gradient"], "gradient")


@pytest.mark.parametrize("name", [*TAP, *PLAIN])
def test_official_state_dict_loads_and_a_saved_one_again(name: str):
    entries = {entry: torch.empty(shape, device="meta") for entry, shape in _entries(name)}
    model = timm.create_model(name, device="meta")
    own = {key: value.shape for key, value in model.state_dict().items()}
    converter = rvt.checkpoint_filter_fn if "rvt" in name else fan.checkpoint_filter_fn
    for source in (entries, {("model" if "rvt" in name else "state_dict"): entries}):
        first = converter(source, model)
        assert {key: value.shape for key, value in first.items()} == own, "strict: every entry, and no other"
        assert list(converter(first, model)) == list(first), "a state dict of ours passes through"


def test_segmentation_network_equals_the_authors():
    """Four maps and the logits of the head; the weights that it leaves out are those that nothing depends on."""
    name = "tap_fan_base_16_p4_hybrid_seg"
    golden = rule.load(name)
    state_dict = rule.state_dict(golden["state_dict"])
    model: Any = timm.create_model(name, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(segmentation.checkpoint_filter_fn({"meta": {}, "state_dict": state_dict}, model))
    unused = [
        value
        for entry, value in state_dict.items()
        if re.match(r"backbone\.cls_(token|attn_blocks\.\d\.(attn|mlp|gamma2))|decode_head\.conv_seg", entry)
    ]
    assert sum(p.numel() for p in model.parameters()) + sum(v.numel() for v in unused) == golden["params"]
    x = rule.inputs(**golden["input"])
    for context in (torch.inference_mode(), torch.enable_grad()):
        with context:
            features = model.forward_features(x)
            logits = model.forward_head(features)
        for i, (feature, expected) in enumerate(zip(features, golden["features"].values(), strict=True)):
            rule.assert_matches(feature, expected, f"map {i}")
        rule.assert_matches(logits, golden["logits"], "logits")


def _entries(name: str) -> Any:
    return rule._expanded(rule.load(name)["state_dict"])
