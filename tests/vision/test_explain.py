"""Recorded attention, and heat maps made of it: what they must add up to, and that they point at the evidence."""

from __future__ import annotations

import pytest
import timm
import torch
from test_timm_contract import create, images, small
from torch import Tensor, nn

from vision.attention import AttentionTap, record_attention
from vision.biformer import AttentionLePE, BiLevelRoutingAttention, BiLevelRoutingAttentionNCHW
from vision.explain import attention_map, class_activation, heatmap
from vision.litv2 import HiLo
from vision.pyramid import PyramidBackbone


@small
@pytest.mark.parametrize("size", [(64, 64), (90, 70)])
@torch.no_grad()
def test_listening_changes_no_output_and_rows_sum_to_one(small: str, size: tuple[int, int]):
    model = create(small).eval()
    x = images(2, 3, *size)
    expected = model(x)
    with record_attention(model) as layers:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(layers) == sum(isinstance(m, AttentionTap) for m in model.modules())
    for name, (layer,) in layers.items():
        rows = layer.attn.sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), msg=lambda m, name=name: f"{name}: {m}")
        assert layer.attn.shape[-1] == layer.key_grid[0] * layer.key_grid[1]
    torch.testing.assert_close(model(x), expected)
    assert not any(m.is_open for m in model.modules() if isinstance(m, AttentionTap))


def test_taps_close_after_an_error():
    attn = AttentionLePE(16, 2)
    with pytest.raises(ZeroDivisionError), record_attention(attn):
        attn(images(1, 4, 4, 16))
        raise ZeroDivisionError
    assert not attn.tap.is_open


@pytest.mark.parametrize(("H", "W"), [(8, 8), (7, 5)])
@torch.no_grad()
def test_routed_attention_is_zero_outside_the_chosen_regions(H: int, W: int):
    bra = BiLevelRoutingAttention(16, 2, 4, topk=3)
    x = torch.randn(2, H, W, 16)
    with record_attention(bra) as layers:
        bra(x)
    (layer,) = layers[""]
    (height, width), S = layer.key_grid, 4
    assert height % S == width % S == 0
    assert layer.extent == (height / H, width / W)
    h, w = height // S, width // S
    attn = layer.attn.reshape(2, 2, S, h, S, w, S, h, S, w)
    between_regions = attn.sum((1, 3, 5, 7, 9)).reshape(2, S * S, S * S)
    assert ((between_regions > 0).sum(-1) == 3).all()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (AttentionLePE(16, 2, side_dwconv=0), (1, 4, 6, 16)),
        (BiLevelRoutingAttention(16, 2, 2, topk=2, side_dwconv=0), (1, 4, 6, 16)),
        (BiLevelRoutingAttentionNCHW(16, 2, 2, topk=2, side_dwconv=0), (1, 16, 4, 6)),
        (HiLo(16, 2, alpha=1.0), (1, 4, 6, 16)),
    ],
)
def test_the_map_is_part_of_the_graph(layer: nn.Module, shape: tuple[int, ...]):
    with record_attention(layer) as layers:
        out = layer(torch.randn(shape))
    (kept,) = next(iter(layers.values()))
    (grad,) = torch.autograd.grad(out.square().sum(), kept.attn)
    assert grad.shape == kept.attn.shape and grad.abs().sum() > 0


OTHERS = ["resnet10t", "test_vit", "test_convnext"]


def any_model(name: str) -> nn.Module:
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


def test_a_network_without_a_feature_map_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    with pytest.raises(ValueError, match="Sequential has no feature map"):
        heatmap(model, images())


def test_without_classifier_the_features_are_explained():
    maps = heatmap(create("biformer", num_classes=0), images())
    assert maps.amax() == pytest.approx(1.0)


def test_attention_of_our_backbones_and_class_activation_of_others():
    ours, theirs = create("biformer").eval(), any_model("resnet10t").eval()
    x = images()
    assert isinstance(ours, PyramidBackbone)
    torch.testing.assert_close(heatmap(ours, x), attention_map(ours, x))
    torch.testing.assert_close(heatmap(theirs, x), class_activation(theirs, x))


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
