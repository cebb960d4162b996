"""Polarized self-attention: the layer against the formulas written out, the networks it is put into."""

from __future__ import annotations

import copy
import itertools
from typing import Any, get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.hrnet import HighResolutionNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from vision import psa
from vision.psa import (
    Form,
    Layout,
    PolarizedBasicBlock,
    PolarizedHRNet,
    PolarizedHRNetFeatures,
    PolarizedSelfAttention,
    polarized_masks,
)

forms = pytest.mark.parametrize(("layout", "form"), list(itertools.product(get_args(Layout), get_args(Form))))
layouts = pytest.mark.parametrize("layout", get_args(Layout))


def stage(branches: int, block_type: str = "BASIC") -> dict[str, Any]:
    return {
        "num_modules": 1,
        "num_branches": branches,
        "block_type": block_type,
        "num_blocks": (1,) * branches,
        "num_channels": tuple(8 * 2**i for i in range(branches)),
        "fuse_method": "SUM",
    }


TINY = {"stem_width": 16, "stage1": stage(1, "BOTTLENECK"), **{f"stage{n}": stage(n) for n in (2, 3, 4)}}


def written_out(layer: Any, x: Tensor) -> Tensor:
    """Every convolution at every place, one image and one product after another."""
    return torch.cat([_one(layer, image[None]) for image in x])


def _one(layer: Any, x: Tensor) -> Tensor:
    _, C, H, W = x.shape
    q, v = F.conv2d(x, layer.conv_q_right.weight).flatten(), F.conv2d(x, layer.conv_v_right.weight)
    z = torch.stack([(v[0, c].flatten() * q.softmax(0)).sum() for c in range(C // 2)])
    channel = layer.conv_up(z[None, :, None, None]).sigmoid()
    seen = x if layer.layout == "parallel" else x * channel
    g = F.conv2d(seen, layer.conv_q_left.weight)[0].flatten(1).mean(1)  # [C/2]
    theta = F.conv2d(seen, layer.conv_v_left.weight)[0].flatten(1)  # [C/2, P]
    if layer.form == "paper":
        context = g.softmax(0) @ theta
    elif layer.layout == "parallel":
        context = (g @ theta).softmax(0)
    else:
        context = g @ theta.softmax(1)
    spatial = context.sigmoid().view(1, 1, H, W)
    return x * channel + x * spatial if layer.layout == "parallel" else seen * spatial


@forms
@pytest.mark.parametrize("size", [(1, 16, 7, 5), (3, 18, 4, 9)])
def test_layer_is_the_formula(layout: Layout, form: Form, size: tuple[int, ...]):
    layer = PolarizedSelfAttention(size[1], layout, form=form).double()
    x = torch.randn(size, dtype=torch.double, requires_grad=True)
    weight = torch.randn(size, dtype=torch.double)
    results = []
    for call in (layer, lambda x: written_out(layer, x)):
        gradients = torch.autograd.grad((call(x) * weight).sum(), [x, *layer.parameters()])
        results.append((call(x), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@forms
def test_inference_and_either_memory_format_give_the_same(layout: Layout, form: Form):
    layer = PolarizedSelfAttention(24, layout, form=form)
    x = torch.randn(2, 24, 9, 6)
    y = layer(x)
    before = x.clone()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        z = x.contiguous(memory_format=memory_format)
        assert layer(z).is_contiguous(memory_format=memory_format)
        with torch.inference_mode():
            torch.testing.assert_close(layer(z), y, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before), "the input is not written to"


@forms
def test_masks_are_what_the_layer_applies(layout: Layout, form: Form):
    layer = PolarizedSelfAttention(16, layout, form=form)
    x = torch.randn(2, 16, 6, 5)
    channel, spatial = layer.masks(x)
    assert channel.shape == (2, 16, 1, 1) and spatial.shape == (2, 1, 6, 5)
    assert all(0 < mask.min() and mask.max() < 1 for mask in (channel, spatial))
    expected = x * (channel + spatial) if layout == "parallel" else x * (channel * spatial)
    torch.testing.assert_close(layer(x), expected)


def test_masks_of_a_whole_network():
    model = timm.create_model("psa_resnet18", num_classes=2).eval()
    masks = polarized_masks(model, torch.randn(2, 3, 64, 32))
    assert list(masks) == [name for name, m in model.named_modules() if isinstance(m, PolarizedSelfAttention)]
    assert masks["layer1.0.deattn"].spatial.shape == (2, 1, 16, 8)
    assert masks["layer4.1.deattn"].channel.shape == (2, 512, 1, 1)
    x = torch.randn(2, 8, 5, 4)
    layer: Any = nn.Sequential(PolarizedSelfAttention(8))
    (alone,) = polarized_masks(layer, x).values()
    assert torch.equal(alone.spatial, layer.get_submodule("0").masks(x).spatial)
    assert not layer[0]._forward_pre_hooks, "nothing is left behind"
    with pytest.raises(ValueError, match="no PolarizedSelfAttention"):
        polarized_masks(nn.Linear(3, 2), x)


@layouts
def test_the_papers_spatial_mask_varies_and_the_released_one_hardly(layout: Layout):
    x = torch.randn(1, 32, 64, 48)
    released = PolarizedSelfAttention(32, layout)
    paper = PolarizedSelfAttention(32, layout, form="paper")
    paper.load_state_dict(released.state_dict())
    flat, varied = released.masks(x).spatial, paper.masks(x).spatial
    assert (flat - 0.5).abs().max() < 0.01
    assert varied.std() > 20 * flat.std()


def test_the_order_of_places_does_not_matter():
    layer = PolarizedSelfAttention(16, "sequential")
    x = torch.randn(2, 16, 6, 6)
    shuffle = torch.randperm(36)
    moved = x.flatten(2)[..., shuffle].unflatten(2, (6, 6))
    expected = layer(x).flatten(2)[..., shuffle].unflatten(2, (6, 6))
    torch.testing.assert_close(layer(moved), expected)


@layouts
def test_images_of_a_batch_do_not_see_each_other_in_lower_precision_too(layout: Layout):
    layer = PolarizedSelfAttention(16, layout).eval()
    x = torch.randn(3, 16, 6, 6)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(layer(x).float(), layer.float()(x), rtol=0.05, atol=0.02)
        low = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_start_of_the_weights():
    layer = PolarizedSelfAttention(256)
    for conv in (layer.conv_q_right, layer.conv_v_right, layer.conv_q_left, layer.conv_v_left):
        assert conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.2)
    network = timm.create_model("psa_resnet18", num_classes=2)
    started = network.get_parameter("layer3.0.deattn.conv_q_right.weight")
    assert started.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.2), "not ResNet's own start"


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"channels": 8, "layout": "both"}, ValueError, "'parallel', 'sequential'"),
        ({"channels": 8, "form": "new"}, ValueError, "'released', 'paper'"),
        ({"channels": 1}, ValueError, "at least 2"),
        ({"channels": 4, "layout": "sequential"}, ValueError, "at least 8"),
        ({"channels": 8, "layot": "parallel"}, TypeError, "layot"),
    ],
)
def test_bad_options(kwargs: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        PolarizedSelfAttention(**kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("resnet50", {"block_args": {"attn_layer": PolarizedSelfAttention}}, 16),
        ("efficientnet_b0", {"se_layer": PolarizedSelfAttention}, 16),
        ("nf_resnet50", {"attn_layer": PolarizedSelfAttention}, 16),
    ],
)
def test_timm_takes_it_as_attention(name: str, kwargs: dict[str, Any], count: int):
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    assert sum(isinstance(m, PolarizedSelfAttention) for m in model.modules()) == count
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def layers_of(model: nn.Module) -> dict[str, PolarizedSelfAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PolarizedSelfAttention)}


@pytest.mark.parametrize(
    ("name", "blocks", "inner", "output"),
    [
        ("psa_resnet18", 8, [64, 128, 256, 512], [64, 128, 256, 512]),
        ("psa_resnet50", 16, [64, 128, 256, 512], [256, 512, 1024, 2048]),
        ("psa_resnet101", 33, [64, 128, 256, 512], [256, 512, 1024, 2048]),
    ],
)
def test_resnets_have_one_layer_a_block(name: str, blocks: int, inner: list[int], output: list[int]):
    for placement, widths in (("inner", inner), ("output", output)):
        layers = layers_of(timm.create_model(name, placement=placement, layout="sequential", device="meta"))
        assert len(layers) == blocks and {layer.layout for layer in layers.values()} == {"sequential"}
        assert sorted({layer.conv_q_right.in_channels for layer in layers.values()}) == widths
        assert {key.rpartition(".")[2] for key in layers} == {"deattn" if placement == "inner" else "se"}


@pytest.mark.parametrize("placement", ["inner", "output"])
@layouts
def test_resnet_trains(placement: str, layout: Layout):
    model = timm.create_model(
        "psa_resnet18", num_classes=5, placement=placement, layout=layout, drop_path_rate=0.1, drop_block_rate=0.1
    ).train()
    model(torch.randn(2, 3, 65, 40)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_block_without_attention_is_timms():
    """Where the masks are 1 in sum, the polarized blocks are those of timm."""
    for ours, theirs in (
        (psa.PolarizedBottleneck, Bottleneck),
        (PolarizedBasicBlock, BasicBlock),
    ):
        block: Any = ours(theirs.expansion * 16, 16).eval()
        block.deattn = nn.Identity()
        plain = theirs(theirs.expansion * 16, 16).eval()
        plain.load_state_dict(block.state_dict())
        x = torch.randn(2, theirs.expansion * 16, 9, 7)
        assert torch.equal(block(x), plain(x))


def test_hrnet_has_the_published_number_of_layers_where_they_belong():
    layers = layers_of(timm.create_model("psa_hrnet_w48", device="meta"))
    assert len(layers) == 104
    assert {key.partition(".")[0] for key in layers} == {"stage2", "stage3", "stage4"}
    assert all(key.endswith(".deattn") for key in layers)


def tiny(cls: type = PolarizedHRNet, **kwargs: Any) -> Any:
    return cls(TINY, **{"num_classes": 7, **kwargs})


def test_hrnet_without_attention_is_timms():
    model = tiny().eval()
    for name in layers_of(model):
        model.set_submodule(name, nn.Identity())
    theirs = HighResolutionNet(TINY, num_classes=7).eval()
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [(64, 32), (97, 41), (70, 130)])
def test_hrnet_takes_any_size(interpolation: Any, size: tuple[int, int]):
    model = tiny(interpolation=interpolation, layout="sequential", head="maps").eval()
    maps = model(torch.randn(1, 3, *size))
    expected = [[-(-side // stride) for side in size] for stride in (4, 8, 16, 32)]
    assert [list(m.shape[2:]) for m in maps] == expected


def test_hrnet_trains_with_and_without_checkpointing():
    model = tiny(layout="sequential").train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 64)
    for net in (model, twin):
        net(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kwargs", [{"interpolation": "cubic"}, {"layout": "x"}, {"form": "x"}])
def test_hrnet_refuses_unknown_options(kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match="expected one of"):
        tiny(**kwargs)
    with pytest.raises(ValueError, match="expected one of 'inner', 'output'"):
        timm.create_model("psa_resnet18", placement="middle")


def test_features_keep_the_names_of_the_parameters():
    names = dict(timm.create_model("psa_hrnet_w32", device="meta").named_parameters())
    model: Any = timm.create_model("psa_hrnet_w32", features_only=True, device="meta")
    own = [name for name, _ in model.named_parameters()]
    assert set(own) < set(names) and sum(".deattn." in name for name in own) == 104 * 5
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    maps = model(torch.empty(1, 3, 96, 64, device="meta"))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    (high,) = tiny(PolarizedHRNetFeatures, feature_location="", out_indices=(1,))(torch.zeros(1, 3, 96, 64))
    assert high.shape == (1, 8, 24, 16), "the branch itself, without timm's wider layers on top"


def test_saved_with_its_options_and_loaded_again(tmp_path):
    kwargs = {"layout": "sequential", "placement": "output", "form": "paper", "num_classes": 3}
    model = timm.create_model("psa_resnet18", **kwargs).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_keypoints_are_learnt_from_the_map_of_highest_resolution():
    """What the method is for: `features_only`, one convolution on top, a heat map for each keypoint."""
    torch.manual_seed(1)
    backbone = tiny(PolarizedHRNetFeatures, feature_location="", out_indices=(1,), layout="sequential")
    model = nn.ModuleList([backbone, nn.Conv2d(backbone.feature_info.channels()[0], 2, 1)]).train()
    where = torch.randint(4, 28, (6, 2, 2))  # two points in each picture, x and y
    axis = torch.arange(32)
    distance = (axis[None, None, None, :] - where[..., 0, None, None]) ** 2
    distance = distance + (axis[None, None, :, None] - where[..., 1, None, None]) ** 2
    target = torch.exp(-distance / 8.0)[..., ::2, ::2]  # [6, 2, 16, 16]
    pictures = F.pad(torch.exp(-distance / 2.0), (0, 0, 0, 0, 0, 1))  # a bright dot in one channel each
    pictures = F.interpolate(pictures, scale_factor=2.0)  # [6, 3, 64, 64]: the map has a quarter of that
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(model[1](model[0](pictures)[0]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0], losses
