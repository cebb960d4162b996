"""Heat maps: range and shape, whose evidence they show, what they leave behind, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from test_timm_contract import create, images, small
from torch import Tensor, nn

from vision.attention import attention_layers, record_attention
from vision.explain import attended, attention_map, class_activation, heatmap
from vision.pyramid import PyramidBackbone
from vision.rollout import rollout
from vision.sparsifiner import connectivity


@pytest.mark.parametrize(
    "name",
    [
        "biformer_nano",
        "litv2_nano",
        "resnet10t",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "cait_xxs24_224",
    ],
)
def test_a_map_per_image_from_zero_to_one(name: str):
    model = timm.create_model(name, num_classes=5)
    maps = heatmap(model, torch.randn(2, 3, 224, 224))
    assert maps.shape == (2, 224, 224)
    assert maps.dtype == torch.float32
    assert maps.amin((1, 2)).tolist() == [0, 0]
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1])


OTHERS = ["resnet10t", "test_vit", "test_convnext"]


def any_model(name: str) -> Any:
    if name in OTHERS:
        return timm.create_model(name, num_classes=10, **({"img_size": (64, 96)} if "vit" in name else {}))
    return create(name)


everything = pytest.mark.parametrize("name", ["biformer", "biformer_stl", "biformer_stl_nchw", "litv2", *OTHERS])


@everything
def test_heatmap_is_a_map_from_zero_to_one(name: str):
    model = any_model(name).eval()
    x = images(2, 3, 64, 96)
    maps = heatmap(model, x)
    assert maps.shape == (2, 64, 96) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.amin((1, 2)).tolist() == [0.0, 0.0]
    assert all(top == pytest.approx(1.0) or top == 0.0 for top in maps.amax((1, 2)).tolist())
    assert (maps.amax((1, 2)) > 0).any() and maps.isfinite().all()


@pytest.mark.parametrize("name", ["biformer_nano", "litv2_nano"])
def test_any_image_size_and_no_trace_left(name: str):
    model = timm.create_model(name).train()
    with torch.inference_mode():
        maps = heatmap(model, torch.randn(1, 3, 200, 333), target=7)
    assert maps.shape == (1, 200, 333)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@everything
def test_heatmap_leaves_no_trace(name: str):
    model = any_model(name).train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    frozen.requires_grad_(False)
    x = images(2, 3, 64, 96)
    with torch.inference_mode():
        heatmap(model, x)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "also the running statistics"
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad


@small
def test_a_heatmap_keeps_frozen_layers_in_evaluation(small: str):
    model = create(small).train()
    model.norm.eval()
    heatmap(model, images())
    assert model.training and not model.norm.training


@everything
def test_each_image_has_a_map_of_its_own(name: str):
    model = any_model(name).eval()
    x = images(3, 3, 64, 96)
    alone = torch.cat([heatmap(model, one) for one in x.split(1)])
    torch.testing.assert_close(heatmap(model, x), alone, rtol=1e-2, atol=1e-3)


@everything
def test_target(name: str):
    model = any_model(name).eval()
    x = images(2, 3, 64, 96)
    likely = model(x).argmax(1)
    torch.testing.assert_close(heatmap(model, x), heatmap(model, x, likely))
    one, each = heatmap(model, x, 3), heatmap(model, x, torch.tensor([3, 4]))
    torch.testing.assert_close(one[0], each[0])
    assert not torch.allclose(one[1], each[1]), "another class, another map"


@pytest.mark.parametrize("target", [-1, 10, torch.tensor([0, 99])])
def test_a_class_that_there_is_not_is_named(target: int | Tensor):
    with pytest.raises(ValueError, match="no class of this model; expected 0 to 9"):
        heatmap(create("litv2"), images(), target)


def test_what_cannot_be_explained_is_refused_by_name():
    model = timm.create_model("litv2_nano", num_classes=10)
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"target=10 is no class of this model; expected 0 to 9"):
        heatmap(model, images, 10)
    with pytest.raises(ValueError, match="has no feature map to explain"):
        heatmap(nn.Flatten(), images)
    with pytest.raises(ValueError, match="CrossVit has several last maps"):
        heatmap(timm.create_model("crossvit_tiny_240"), torch.randn(1, 3, 240, 240))


def test_a_network_without_classifier_is_asked_for_its_features():
    model = timm.create_model("litv2_nano", num_classes=0)
    assert heatmap(model, torch.randn(1, 3, 64, 64)).amax() == pytest.approx(1)


def test_attention_of_our_backbones_and_class_activation_of_others():
    ours, theirs = create("biformer").eval(), any_model("resnet10t").eval()
    x = images()
    assert isinstance(ours, PyramidBackbone)
    torch.testing.assert_close(heatmap(ours, x), attention_map(ours, x))
    torch.testing.assert_close(heatmap(theirs, x), class_activation(theirs, x))


class OneSpot(nn.Module):
    """A 'network' whose class 0 is the brightness of the upper left, class 1 that of the lower right."""

    num_classes = 2

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 8)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        corners = torch.zeros(2, *x.shape[1:])
        corners[0, 0] = corners[1, 1] = 1
        return torch.einsum("bchw,kchw->bk", x, corners)


def test_class_activation_points_at_the_evidence_of_the_class_asked_for():
    image = torch.zeros(1, 3, 64, 64)
    image[:, 0, :16, :16] = 1  # channel 0, upper left: class 0
    image[:, 1, 48:, 48:] = 2  # channel 1, lower right: class 1
    model = OneSpot()
    assert class_activation(model, image, 0)[0, 8, 8] == 1
    assert class_activation(model, image, 0)[0, 32:, 32:].max() < 0.01
    assert class_activation(model, image)[0, 56, 56] == 1  # by default the likelier class
    assert torch.equal(
        heatmap(model, image.expand(2, -1, -1, -1), torch.tensor([0, 1]))[1], class_activation(model, image, 1)[0]
    )


def test_class_activation_is_that_of_the_paper_where_both_exist():
    """With average pooling and a linear classifier: the class's weights, applied at each place."""
    model = any_model("resnet10t").eval()
    nn.init.normal_(model.fc.weight)
    x = images(2, 3, 96, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        target = model(x).argmax(1)  # a class that something speaks for
        cam = torch.einsum("bchw,bc->bhw", features, model.fc.weight[target]).relu()
        cam = nn.functional.interpolate(cam[:, None], (96, 96), mode="bilinear")[:, 0]
        low, high = cam.amin((1, 2), keepdim=True), cam.amax((1, 2), keepdim=True)
    torch.testing.assert_close(class_activation(model, x, target), (cam - low) / (high - low), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("small", ["biformer", "litv2"])
def test_heat_is_where_the_evidence_is(small: str):
    """A network that learnt to tell where a bright square is not from its place but from its colour.

    Sixty steps are enough to separate the two classes; the map must then be hotter on the square than beside it.
    """
    model = create(small, num_classes=2).train()
    generator = torch.Generator().manual_seed(0)

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        x = 0.1 * torch.randn(size, 3, 96, 96, generator=generator)
        labels = torch.arange(size) % 2
        where = torch.zeros(size, 96, 96, dtype=torch.bool)
        for i, (row, column) in enumerate(torch.randint(0, 3, (size, 2), generator=generator).tolist()):
            where[i, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = True
            x[i, 2 * int(labels[i]), where[i]] += 2.0  # red or blue
        return x, labels, where

    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        x, labels, _ = batch(16)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, labels, where = batch(16)
    assert (model.eval()(x).argmax(1) == labels).float().mean() > 0.9, "it has learnt its task"
    maps = heatmap(model, x, labels)
    inside = (maps * where).sum((1, 2)) / where.sum((1, 2))
    outside = (maps * ~where).sum((1, 2)) / (~where).sum((1, 2))
    assert inside.mean() > 1.5 * outside.mean(), f"inside {inside.mean():.2f}, outside {outside.mean():.2f}"


def a_vit(**kwargs: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), num_classes=10, depth=3, **kwargs).eval()


def test_attention_of_a_transformer_is_equation_6_of_the_paper():
    """Against the product of matrices written out, and for class tokens as well as for pooled ones."""
    for model in (a_vit(), a_vit(global_pool="avg", class_token=False)):
        x = images(2, 3, 64, 96)
        with record_attention(model) as layers:
            score = model(x)[:, 3].sum()
        attn = [layer.attn for (layer,) in layers.values()]
        relevance = torch.eye(attn[0].shape[-1]).repeat(2, 1, 1)
        for a, grad in zip(attn, torch.autograd.grad(score, attn), strict=True):
            relevance = relevance + (a.detach() * grad).relu().mean(1) @ relevance
        prefix = model.num_prefix_tokens
        row = relevance[:, 0] if prefix else relevance.sum(1)
        expected = row[:, prefix:].unflatten(1, (1, 4, 6))
        expected = nn.functional.interpolate(expected, (64, 96), mode="bilinear")[:, 0]
        low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
        maps = heatmap(model, x, 3, method="attention")
        torch.testing.assert_close(maps, (expected - low) / (high - low), rtol=1e-2, atol=1e-3)


def test_a_method_that_a_model_has_not_is_refused():
    with pytest.raises(ValueError, match=r"method='cam': expected one of 'auto', 'attention', 'activation', 'rollout'"):
        heatmap(create("litv2"), images(), method="cam")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"ResNet has no attention to record; method='activation' works"):
        heatmap(any_model("resnet10t"), images(), method="attention")
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2)
    with pytest.raises(ValueError, match="SwinTransformer attends in windows"):
        heatmap(swin, images(1, 3, 64, 64), method="attention")
    with pytest.raises(ValueError, match=r"'layers\.0\.blocks\.0\.attn' of SwinTransformer attends within windows"):
        attended(swin, images(1, 3, 64, 64), (0.5, 0.5), layer=0)


@torch.no_grad()
def test_attended_is_the_row_of_the_place():
    model = a_vit()
    x = images(2, 3, 64, 96)
    with record_attention(model) as layers:
        model(x)
    row = layers["blocks.1.attn"][0].attn[:, :, 1 + 2 * 6 + 4, 1:].mean(1)  # the patch in row 2, column 4
    expected = (row / row.amax(1, keepdim=True)).unflatten(1, (4, 6))
    expected = expected.repeat_interleave(16, 1).repeat_interleave(16, 2)
    torch.testing.assert_close(attended(model, x, (0.5, 0.7), layer=1), expected)
    torch.testing.assert_close(attended(model, x, (0.74, 0.82), layer="blocks.1.attn"), expected)
    assert not torch.allclose(attended(model, x, (0.0, 0.0), layer=1), expected)
    assert attended(model, x, (0.5, 0.7), layer=1, connectivity=True).unique().tolist() == [1.0]


@torch.no_grad()
def test_attended_shows_the_routed_regions_of_biformer():
    model = timm.create_model("biformer_nano").eval()
    x = images(1, 3, 224, 224)
    name = next(n for n in attention_layers(model) if n.startswith("stages.0"))
    regions = attended(model, x, (0.3, 0.6), layer=name, connectivity=True)[0]
    assert set(regions.unique().tolist()) == {0.0, 1.0}, "all heads share the route"
    attn = model.get_submodule(name)
    assert regions.mean().item() == pytest.approx(attn.topk / attn.n_win**2)
    row = attended(model, x, (0.3, 0.6), layer=name)[0]
    assert row.amax() == 1 and ((row > 0) == (regions > 0)).all()


@torch.no_grad()
def test_attended_where_keys_are_averages_of_windows():
    model = timm.create_model("litv2_nano").eval()
    maps = attended(model, images(2, 3, 160, 224), (0.9, 0.1), layer=0)
    assert maps.shape == (2, 160, 224) and maps.amax((1, 2)).tolist() == [1, 1]
    assert maps.isfinite().all() and (maps >= 0).all()


def test_attended_refuses_what_is_not_there():
    model = a_vit()
    x = images(1, 3, 64, 96)
    with pytest.raises(ValueError, match=r"at=\(0\.5, 1\.0\): expected \(y, x\) from 0 up to"):
        attended(model, x, (0.5, 1.0))
    with pytest.raises(ValueError, match=r"layer=3: VisionTransformer has 3 layers of attention: blocks\.0\.attn"):
        attended(model, x, (0.5, 0.5), layer=3)
    with pytest.raises(ValueError, match="ResNet has no attention that can be recorded"):
        attended(any_model("resnet10t"), x, (0.5, 0.5))


def test_rollout_is_one_of_the_methods():
    model = a_vit().train()
    x = images(2, 3, 64, 96)
    maps = heatmap(model, x, method="rollout")
    expected = rollout(model.eval(), x)
    assert maps.shape == (2, 64, 96) and maps.amax((1, 2)).tolist() == pytest.approx([1, 1])
    assert maps[0, 8::16, 8::16].argmax() == expected[0].argmax()
    with pytest.raises(ValueError, match="ResNet has no `blocks` and `patch_embed` to roll out"):
        heatmap(any_model("resnet10t"), x, method="rollout")


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("dcal_deit_tiny_patch16_224", {"img_size": (64, 96), "depth": 3}),
        ("sparsifiner_deit_tiny_patch16_224", {"img_size": (64, 96), "depth": 3}),
        ("tap_fan_tiny_8_p4_hybrid", {}),
        ("tap_rvt_tiny_plus", {"img_size": (64, 96)}),
        ("psa_resnet18", {}),
        ("ela_resnet18", {}),
    ],
)
def test_every_method_is_explained(name: str, fixed: dict[str, Any]):
    model = timm.create_model(name, num_classes=10, **fixed).eval()
    x = images(2, 3, 64, 96)
    methods = ["auto", "activation"] if "resnet" in name else ["auto", "activation", "attention"]
    for method in methods:
        maps = heatmap(model, x, 3, method=method)  # pyright: ignore[reportArgumentType]
        assert maps.shape == (2, 64, 96) and maps.isfinite().all() and maps.min() == 0 and maps.max() <= 1
    if "resnet" in name:
        return
    layer = attention_layers(model)[0]
    row = attended(model, x, (0.6, 0.1), layer)
    assert row.shape == (2, 64, 96) and row.amax((1, 2)).tolist() == [1, 1]


def test_a_layer_where_a_few_tokens_ask_is_named():
    model = timm.create_model("dcal_deit_tiny_patch16_224", img_size=64, depth=2)
    with pytest.raises(ValueError, match=r"in layer 'glca\.attn' of DCAL not every place attends"):
        attended(model, images(1, 3, 64, 64), (0.5, 0.5), "glca.attn")


@torch.no_grad()
def test_attended_shows_the_keys_that_sparsifiner_keeps():
    model = timm.create_model("sparsifiner_deit_tiny_patch16_224", img_size=64, depth=2).eval()
    x = images(2, 3, 64, 64)
    share = attended(model, x, (0.3, 0.8), layer=1, connectivity=True)
    kept = connectivity(model, x, (1, 3))[:, 1].float().mean(1)  # [B, h, w]
    torch.testing.assert_close(share[:, ::16, ::16], kept)
