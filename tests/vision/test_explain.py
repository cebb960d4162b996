"""Heat maps: range, shape, whose evidence they show, and what is refused."""

import pytest
import timm
import torch
from torch import nn

import vision  # noqa: F401 - registers the models
from vision.attention import record_attention
from vision.explain import attention_map, class_activation, heatmap


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


@pytest.mark.parametrize("name", ["biformer_nano", "litv2_nano"])
def test_any_image_size_and_no_trace_left(name: str):
    model = timm.create_model(name).train()
    with torch.inference_mode():
        maps = heatmap(model, torch.randn(1, 3, 200, 333), target=7)
    assert maps.shape == (1, 200, 333)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


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


@pytest.mark.parametrize("name", ["biformer_nano", "biformer_stl_nchw", "litv2_nano"])
def test_recorded_attention_is_attention(name: str):
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        expected = model(images)
        with record_attention(model) as layers:
            logits = model(images)
        assert torch.equal(model(images), expected)  # the taps are closed again
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    kept = [layer_map for maps in layers.values() for layer_map in maps]
    assert len(kept) == len(layers) > 1
    for layer_map in kept:
        assert layer_map.attn.shape[-1] == layer_map.key_grid[0] * layer_map.key_grid[1]
        torch.testing.assert_close(layer_map.attn.sum(-1), torch.ones(layer_map.attn.shape[:-1]))


def test_routed_attention_is_zero_outside_the_chosen_regions():
    model = timm.create_model("biformer_nano").eval()
    with torch.no_grad(), record_attention(model.stages[1][0]) as layers:
        model(torch.randn(1, 3, 224, 224))
    attn = layers["attn"][0].attn  # 28 x 28 tokens; 4 regions of 4 x 4 are chosen
    assert ((attn > 0).sum(-1) <= 64).all()
    assert ((attn > 0).sum(-1) > 0).all()


def test_padding_stays_outside_the_picture():
    model = timm.create_model("biformer_nano").eval()
    with torch.no_grad(), record_attention(model.stages[2]) as layers:
        model(torch.randn(1, 3, 256, 256))  # 16 x 16 tokens, padded to 21 x 21
    layer_map = next(iter(layers.values()))[0]
    assert layer_map.key_grid == (21, 21)
    assert layer_map.extent == (21 / 16, 21 / 16)
    assert attention_map(model, torch.randn(1, 3, 256, 256)).shape == (1, 256, 256)


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
