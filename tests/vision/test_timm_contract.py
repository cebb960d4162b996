"""Every registered network is a first-class timm model: names, configuration, surface, classifier, parameter groups.

What costs time runs on small networks of each layout (`SMALL`); what needs no numbers runs on the meta device, on all.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from parity import rule
from timm.models import get_model_input_config, group_parameters
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vision.pyramid

NAMES = [
    "biformer_base",
    "biformer_nano",
    "biformer_small",
    "biformer_stl",
    "biformer_stl_nchw",
    "biformer_tiny",
    "litv2_base",
    "litv2_base_384",
    "litv2_medium",
    "litv2_nano",
    "litv2_small",
]
PUBLISHED = [name for name in NAMES if not name.endswith("nano")]
SMALL = {
    "biformer": ("biformer_nano", {}),
    "biformer_stl": ("biformer_nano", {"layout": "stl"}),
    "biformer_stl_nchw": ("biformer_nano", {"layout": "stl_nchw"}),
    "litv2": ("litv2_nano", {}),
}
small = pytest.mark.parametrize("small", list(SMALL))
every = pytest.mark.parametrize("name", NAMES)


def create(key: str, **kwargs: Any) -> Any:
    name, fixed = SMALL[key]
    return timm.create_model(name, **{**fixed, "num_classes": 10, **kwargs})


def meta(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, device="meta", **kwargs)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 64, 64))


def test_names():
    assert timm.list_models(module=["biformer", "litv2"]) == NAMES
    assert timm.list_models(module=["biformer", "litv2"], name_matches_cfg=True) == NAMES


@every
def test_size_is_the_published_one(name: str):
    params = sum(p.numel() for p in meta(name).parameters())
    if name in PUBLISHED:
        assert params == rule.load(name)["params"]
    else:
        assert params <= 2_000_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_are_the_published_ones(name: str):
    """Of the method, that is: of the tokens that are attended to, however that is computed on some machine."""
    model = meta(name).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(rule.load(name)["macs"], rel=0.01)


@every
def test_configuration_describes_the_network(name: str):
    model = meta(name).eval()
    cfg = model.default_cfg
    state_dict = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state_dict and f"{cfg['classifier']}.weight" in state_dict
    assert state_dict[f"{cfg['first_conv']}.weight"].shape[1] == model.in_chans == cfg["input_size"][0] == 3
    assert state_dict[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.head_hidden_size)
    assert model.num_classes == cfg["num_classes"] == 1000
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model.forward_head(features).shape == (1, 1000)


@every
def test_features_only(name: str):
    model = meta(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.empty(1, 3, 96, 96, device="meta"))
    assert [tuple(m.shape) for m in maps] == [
        (1, channels, 96 // reduction, 96 // reduction)
        for channels, reduction in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


@every
def test_feature_info_names_modules(name: str):
    model = meta(name)
    for i, info in enumerate(model.feature_info):
        assert model.get_submodule(info["module"]) is model.stage_blocks(i)


@every
def test_unknown_keyword_is_refused(name: str):
    with pytest.raises(TypeError, match="not_a_model_arg"):
        meta(name, not_a_model_arg=1)


@every
def test_device_is_followed_by_all_tensors(name: str):
    model = meta(name, dtype=torch.bfloat16)
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.reset_classifier(0, "")
    model.reset_classifier(3, "avg")
    assert model.head.weight.device.type == "meta" and model.head.weight.dtype == torch.bfloat16


@every
def test_layers_for_layer_decay_cover_all_parameters_in_order(name: str):
    model = meta(name)
    fine = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert set(fine) == {n for n, _ in model.named_parameters()}
    depth = sum(len(model.stage_blocks(i)) for i in range(4))
    assert len(set(fine.values())) == depth + 2, "the stem, each block, the head"
    first = "patch_embed.proj.weight" if name.startswith("litv2") else "downsample_layers.0.0.weight"
    assert fine[first] == 0 and fine["head.weight"] == max(fine.values()) == fine["norm.weight"] + 1
    blocks = [
        fine[f"{info['module']}.{j}.norm2.weight"]
        for i, info in enumerate(model.feature_info)
        for j in range(len(model.stage_blocks(i)))
    ]
    assert blocks == sorted(set(blocks)), "each block after the one before it"
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert set(coarse) == set(fine) and 4 <= len(set(coarse.values())) <= 6


@small
def test_optimiser_gets_every_parameter_once(small: str):
    model = create(small)
    for layer_decay in (None, 0.75):
        groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay).param_groups
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}
    names = {n for n, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names


@small
def test_forward_and_backward(small: str):
    model = create(small, num_classes=42).train()
    out = model(images())
    assert out.shape == (2, 42) and out.isfinite().all()
    out.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@small
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (97, 41), (100, 75), (33, 150)])
def test_any_size(small: str, size: tuple[int, int]):
    model = create(small).train()
    out = model(images(2, 3, *size))
    assert out.shape == (2, 10) and out.isfinite().all()
    out.sum().backward()
    with torch.inference_mode():
        assert model.eval()(images(1, 3, *size)).isfinite().all()


@small
@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(small: str, in_chans: int):
    model = create(small, in_chans=in_chans).eval()
    assert model.in_chans == in_chans
    assert model(images(1, in_chans, 64, 64)).shape == (1, 10)


@small
def test_without_classifier(small: str):
    model = create(small).eval()
    x = images()
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model(x), model.get_classifier()(pooled))
        bare = create(small, num_classes=0).eval()
        bare.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
        torch.testing.assert_close(bare(x), pooled)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        model.reset_classifier(0)
        assert model.num_classes == 0 and isinstance(model.get_classifier(), nn.Identity)
        torch.testing.assert_close(model(x), pooled)
        model.reset_classifier(0, "")
        torch.testing.assert_close(model(x), features)
        torch.testing.assert_close(create(small, num_classes=0, global_pool="").eval()(x).shape, features.shape)


@small
def test_reset_classifier(small: str):
    model = create(small, drop_rate=0.5).eval()
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    model.norm.requires_grad_(False)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model(images()).shape == (2, 5)
    assert not any(m.training for m in model.modules())
    model.reset_classifier(7, "max")
    assert model(images()).shape == (2, 7) and model.global_pool.pool_type == "max"
    model.reset_classifier(5)
    assert model.global_pool.pool_type == "max", "the pooling stays"
    assert not model.norm.weight.requires_grad, "frozen stays frozen"


@small
def test_reset_classifier_leaves_a_frozen_batch_norm_in_evaluation(small: str):
    """Detectors keep the statistics fixed while the rest trains."""
    model = create(small).train()
    model.norm.eval()
    model.reset_classifier(5)
    assert model.head.training and not model.norm.training


@small
@pytest.mark.parametrize(("pool", "width"), [("avg", 256), ("max", 256), ("avgmax", 256), ("catavgmax", 512)])
def test_global_pool(small: str, pool: str, width: int):
    model = create(small, global_pool=pool).eval()
    assert model.head_hidden_size == width and model.head.in_features == width
    features = model.forward_features(images())
    pooled = {
        "avg": features.mean((2, 3)),
        "max": features.amax((2, 3)),
        "avgmax": (features.mean((2, 3)) + features.amax((2, 3))) / 2,
        "catavgmax": torch.cat((features.mean((2, 3)), features.amax((2, 3))), 1),
    }[pool]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    assert model.forward_head(features).shape == (2, 10)


@small
def test_classifier_without_pooling_classifies_each_place(small: str):
    model = create(small).eval()
    features = model.forward_features(images())
    pooled = model.forward_head(features)
    head = copy.deepcopy(model.head)
    model.reset_classifier(0, "")
    model.reset_classifier(10)
    model.head = head
    places = model.forward_head(features)
    assert places.shape == (2, 10, 2, 2)
    torch.testing.assert_close(places.mean((2, 3)), pooled, rtol=1e-4, atol=1e-5)


@small
def test_input_size(small: str):
    model = create(small, img_size=(192, 256)).eval()
    assert model(images(1, 3, 192, 256)).shape == (1, 10)
    assert get_model_input_config(model)["input_size"] == (3, 192, 256)
    before = copy.deepcopy(model.state_dict())
    model.set_input_size((96, 64))
    assert get_model_input_config(model)["input_size"] == (3, 96, 64)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert model(images(1, 3, 96, 64)).shape == (1, 10)


@small
def test_drop_path_acts_in_training_alone_and_rises_with_depth(small: str):
    model = create(small, drop_path_rate=0.8)
    drops = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert drops == sorted(drops) and drops[-1] == pytest.approx(0.8) and len(drops) >= 4
    x = images()
    frozen = [m.eval() for m in model.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert not torch.allclose(model(x), model(x)) and (frozen or small == "litv2")
    model.eval()
    assert torch.equal(model(x), model(x))


@small
def test_dropout_before_the_classifier(small: str):
    model = create(small, drop_rate=0.5).train()
    features = torch.ones(2, model.num_features, 2, 2)
    dropped = model.forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(2, model.num_features))


@small
def test_images_of_a_batch_do_not_see_each_other(small: str):
    model = create(small).eval()
    x = images(3, 3, 72, 56)
    with torch.no_grad():
        alone = torch.cat([model(one) for one in x.split(1)])
        torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x.flip(0)), alone.flip(0), rtol=1e-4, atol=1e-5)


@small
@pytest.mark.parametrize("size", [(64, 64), (90, 70)])
def test_a_few_images_at_a_time_give_what_all_at_once_give(
    small: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    """In inference a stage may take the batch in parts; with gradients it never does."""
    model = create(small).eval()
    x = images(5, 3, *size)
    whole = model(x)
    assert whole.requires_grad
    calls = []
    model.stage_blocks(0)[0].register_forward_hook(lambda _m, _a, out: calls.append(len(out)))
    tokens = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0][0, 0].numel()
    for images_at_once in (1, 2, 3):
        calls.clear()
        monkeypatch.setattr(vision.pyramid, "_TOKENS_AT_ONCE", images_at_once * tokens)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), whole.detach(), rtol=1e-4, atol=1e-5)
        assert max(calls) == images_at_once and sum(calls) == 5, "the parts were really taken"
