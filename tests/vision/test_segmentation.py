"""What segmentation networks share: the sliding window, several scales, the loss, the colours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.segmentation import (
    CITYSCAPES_CLASSES,
    Segmenter,
    palette,
    resize_maps,
    segmentation_loss,
    sliding_window,
)


class Pixelwise(Segmenter):
    """One convolution at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.head_hidden_size, self.in_chans = 4, 3, 3, 3
        self.head = nn.Conv2d(3, 4, 1)
        self.calls: list[tuple[int, ...]] = []

    def forward_features(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return F.avg_pool2d(x, 2, ceil_mode=True)

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_classifier(self, num_classes: int) -> None:
        self.head = nn.Conv2d(3, num_classes, 1)

    def remove_head(self) -> None:
        self.head = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable


def place(x: Tensor) -> Tensor:
    """The mean of what is around each crop: a result that depends on the crop."""
    return x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[-2:])


@pytest.mark.parametrize("size", [(20, 30), (50, 70), (21, 31), (19, 200), (64, 8)])
@pytest.mark.parametrize("stride", [None, (20, 30), (7, 11), (1, 29)])
def test_a_function_of_pixels_alone_is_not_changed_by_the_window(size: tuple[int, int], stride: Any):
    conv = nn.Conv2d(3, 2, 1)
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(sliding_window(conv, x, (20, 30), stride), conv(x))


def test_overlaps_are_averaged_and_the_last_crop_ends_at_the_border():
    x = torch.randn(1, 1, 1, 8)
    y = sliding_window(place, x, (1, 4), (1, 3))
    crops = [x[..., start : start + 4].mean() for start in (0, 3, 4)]  # not from 6, where 2 would be missing
    expected = [crops[0]] * 3 + [(crops[0] + crops[1]) / 2] + [(crops[1] + crops[2]) / 2] * 3 + [crops[2]]
    torch.testing.assert_close(y.flatten(), torch.stack(expected))


def test_one_call_a_place_for_all_pictures_and_none_where_they_fit():
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x

    x = torch.randn(3, 2, 10, 25)
    assert torch.equal(sliding_window(model, x, (10, 30)), x) and calls == [(3, 2, 10, 25)]
    calls.clear()
    torch.testing.assert_close(sliding_window(model, x, (8, 10)), x)
    assert calls == [(3, 2, 8, 10)] * 6


@pytest.mark.parametrize(("window", "stride"), [((0, 5), None), ((5, 5), (6, 5)), ((5, 5), (5, 0))])
def test_windows_that_leave_gaps(window: Any, stride: Any):
    with pytest.raises(ValueError, match="1 ≤ stride ≤ window"):
        sliding_window(lambda x: x, torch.zeros(1, 1, 9, 9), window, stride)


@pytest.mark.parametrize("size", [(32, 48), (33, 17)])
def test_forward_gives_logits_at_the_size_of_the_picture(size: tuple[int, int]):
    model = Pixelwise()
    x = torch.randn(2, 3, *size)
    small = model.forward_head(model.forward_features(x))
    assert torch.equal(model(x), F.interpolate(small, size, mode="bilinear", align_corners=False))
    assert torch.equal(model.predict(x), model(x)), "one scale, no window"


def test_reset_classifier():
    model = Pixelwise()
    model.reset_classifier(7, "")
    assert model.num_classes == model.head.out_channels == 7
    with pytest.raises(ValueError, match="global_pool='avg': each pixel is classified"):
        model.reset_classifier(3, "avg")
    assert model.num_classes == 7


def test_predict_uses_the_networks_window():
    model = Pixelwise()
    model.window, model.stride = (16, 16), (8, 16)
    x = torch.randn(2, 3, 24, 32)
    y = model.predict(x)
    assert model.calls == [(2, 3, 16, 16)] * 4
    torch.testing.assert_close(y, sliding_window(model, x, (16, 16), (8, 16)))


def test_scales_average_probabilities():
    model = Pixelwise()
    model.scales = (0.5, 1.0, 1.5)
    x = torch.randn(2, 3, 32, 48)
    probabilities = []
    for height, width in ((16, 24), (32, 48), (48, 72)):
        logits = model(F.interpolate(x, (height, width), mode="bilinear", align_corners=False))
        probabilities.append(F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False).softmax(1))
    torch.testing.assert_close(model.predict(x).softmax(1), torch.stack(probabilities).mean(0))
    torch.testing.assert_close(model.predict(x, (1,)).softmax(1), probabilities[1])


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_that_are_none(scales: tuple[float, ...]):
    with pytest.raises(ValueError, match="positive factors"):
        Pixelwise().predict(torch.zeros(1, 3, 8, 8), scales)


def test_loss_is_the_mean_over_pixels_with_a_class():
    logits = torch.randn(2, 5, 6, 7, requires_grad=True)
    target = torch.randint(5, (2, 6, 7))
    target[0, :3] = 255
    chosen = target != 255
    pixels = logits.permute(0, 2, 3, 1)[chosen]
    torch.testing.assert_close(segmentation_loss(logits, target), F.cross_entropy(pixels, target[chosen]))
    nothing = segmentation_loss(logits, torch.full_like(target, 255))
    assert nothing == 0 and torch.autograd.grad(nothing, logits)[0].abs().max() == 0
    small = segmentation_loss(logits[..., :3, :4], target)
    resized = F.interpolate(logits[..., :3, :4], (6, 7), mode="bilinear", align_corners=False)
    assert small == segmentation_loss(resized, target)


@pytest.mark.parametrize("target", [torch.zeros(2, 6), torch.zeros(1, 6, 7).long(), torch.zeros(2, 6, 7)])
def test_targets_that_are_no_class_map(target: Tensor):
    with pytest.raises(ValueError, match=r"expected class indices \(2, H, W\)"):
        segmentation_loss(torch.randn(2, 5, 6, 7), target)


def test_resizing_to_the_same_size_is_no_copy():
    x = torch.randn(1, 2, 3, 4)
    assert resize_maps(x, (3, 4)) is x


def test_colours():
    names = [entry.name for entry in CITYSCAPES_CLASSES]
    assert len(set(names)) == 19 and names[0] == "road" and names[18] == "bicycle"
    assert palette(names) == [entry.color for entry in CITYSCAPES_CLASSES]
    many = palette(["car", *(f"class_{i}" for i in range(300))])
    assert many[0] == (0, 0, 142) and len(set(many)) == 301 and (0, 0, 0) not in many
    assert all(0 <= channel <= 255 for color in many for channel in color)
    assert palette(["a", "b"])[0] == palette(["a"])[0]
