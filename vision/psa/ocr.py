"""Object context and attention between scales: heads that segmentation networks put over their backbones.

Papers: Yuan, Chen, Chen and Wang, "Segmentation Transformer: Object-Contextual Representations for Semantic
Segmentation", https://arxiv.org/abs/1909.11065 (`ObjectContextHead`); Tao, Sapra and Catanzaro, "Hierarchical
Multi-Scale Attention for Semantic Segmentation", https://arxiv.org/abs/2005.10821 (`ScaleAttention`, `fuse_scales`).
Original code, as released with polarized self-attention: https://github.com/DeLightCMU/PSA (Apache-2.0), which holds
that of NVIDIA (https://github.com/NVIDIA/semantic-segmentation) and of HRNet; names of the layers are those of that
code.

What differs: the first convolutions of the head, over maps brought to one size and concatenated, are computed where
each map is small (`PyramidConv2d`), equal up to rounding; the pixels' attention to objects is torch's fused kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import register_notrace_module
from torch import Tensor, nn

from vision.attention import AttentionTap, attend
from vision.segmentation import resize_maps

__all__ = ["ObjectContextHead", "PyramidConv2d", "ScaleAttention", "fuse_scales"]


@register_notrace_module  # which way a map takes depends on its size
class PyramidConv2d(nn.Conv2d):
    """A convolution, stride 1, over maps of several sizes, brought to the first one's size and concatenated.

    Takes a list `[B, C_i, H_i, W_i]` with `sum(C_i) = in_channels` and gives `[B, out_channels, H_1, W_1]`, as

        conv(concat(maps[0], bilinear(maps[1]), …))

    does, up to rounding. Bilinear interpolation U acts on places and the weights W_t of one tap act on channels, so
    they commute: `Σ_t shift_t(W_t U x) = Σ_t shift_t U (W_t x)`, where `W_t x` is taken on the small map and
    `shift_t U` is a product with one small matrix along the height and one along the width. A map takes that way where
    it needs fewer multiply-adds, and else the plain one.

    Args:
        in_channels: sum over the maps.
        out_channels: of the result.
        kernel_size: odd; zeros are padded so that the size stays.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, device=None, dtype=None) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, device=device, dtype=dtype)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A list of maps to one map of the first one's size."""
        size = (maps[0].shape[2], maps[0].shape[3])
        parts = self.weight.split([x.shape[1] for x in maps], 1)
        pairs = list(zip(maps, parts, strict=True))
        small = [pair for pair in pairs if self.is_cheaper_small(pair[0], size)]
        plain = [pair for pair in pairs if not self.is_cheaper_small(pair[0], size)]
        x = torch.cat([resize_maps(x, size) for x, _ in plain], 1)
        y = F.conv2d(x, torch.cat([weight for _, weight in plain], 1), self.bias, padding=self.padding)
        for x, weight in small:
            y += self._from_small(x, weight, size)
        return y

    def is_cheaper_small(self, x: Tensor, size: tuple[int, int]) -> bool:
        """Whether a map needs fewer multiply-adds where it is than brought to `size`; the counts are for one output."""
        (H, W), (h, w), C, k = size, x.shape[2:], x.shape[1], self.kernel_size[0]
        return (h, w) != (H, W) and C * k * k * h * w + k * h * k * w * W + k * h * W * H < C * k * k * H * W

    def _from_small(self, x: Tensor, weight: Tensor, size: tuple[int, int]) -> Tensor:
        (h, w), k = x.shape[2:], self.kernel_size[0]
        taps = weight.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1, 1)  # [O k k, C, 1, 1]
        y = F.conv2d(x, taps).unflatten(1, (-1, k, k))  # [B, O, k, k, h, w]
        along_w = self._shifted(w, size[1], y)  # [k w, W]
        along_h = self._shifted(h, size[0], y)  # [k h, H]
        y = y.transpose(3, 4).flatten(4) @ along_w  # [B, O, k, h, W]
        return along_h.mT @ y.flatten(2, 3)  # [B, O, H, W]

    def _shifted(self, small: int, large: int, like: Tensor) -> Tensor:
        """Interpolation from `small` to `large` places, then one shift for each tap: `[k small, large]`."""
        identity = torch.eye(small, device=like.device, dtype=like.dtype)[None]
        to_large = F.interpolate(identity, large, mode="linear", align_corners=False)[0]  # [small, large]
        padded = F.pad(to_large, (self.kernel_size[0] // 2,) * 2)
        return torch.cat([padded[:, tap : tap + large] for tap in range(self.kernel_size[0])])


def _norm_relu(channels: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels, **dd), nn.ReLU(inplace=True))


def _project(in_channels: int, *channels: int, **dd: Any) -> nn.Sequential:
    """1x1 convolutions without bias, each with norm and activation."""
    layers: list[nn.Module] = []
    for out_channels in channels:
        layers += [nn.Conv2d(in_channels, out_channels, 1, bias=False, **dd), _norm_relu(out_channels, **dd)]
        in_channels = out_channels
    return nn.Sequential(*layers)


class _Gather(nn.Module):
    """What each class looks like in this image: pixels, weighted by how much they belong to it."""

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        """`[B, C, h, w]` and class scores `[B, K, h, w]` to `[B, C, K, 1]`."""
        weight = regions.flatten(2).softmax(-1)  # [B, K, P]
        return (weight @ features.flatten(2).mT).mT.unsqueeze(3)  # [B, C, K, 1]


class _ObjectAttention(nn.Module):
    """Each pixel attends to the classes' representations; its map can be recorded (`vision.attention`)."""

    def __init__(self, channels: int, key_channels: int, **dd: Any) -> None:
        super().__init__()
        self.scale = key_channels**-0.5
        self.f_pixel = _project(channels, key_channels, key_channels, **dd)
        self.f_object = _project(channels, key_channels, key_channels, **dd)
        self.f_down = _project(channels, key_channels, **dd)
        self.f_up = _project(key_channels, channels, **dd)
        self.attention_tap = AttentionTap()

    def forward(self, features: Tensor, objects: Tensor) -> Tensor:
        """`[B, C, h, w]` and `[B, C, K, 1]` to `[B, C, h, w]`."""
        query, key, value = (
            x.flatten(2).mT.unsqueeze(1)  # [B, 1, P or K, d]
            for x in (self.f_pixel(features), self.f_object(objects), self.f_down(objects))
        )
        context = attend(query, key, value, self.scale, tap=self.attention_tap)  # [B, 1, P, d]
        return self.f_up(context.squeeze(1).mT.unflatten(2, (features.shape[2], features.shape[3])))


class _Distribute(nn.Module):
    """Pixels with the context of their objects."""

    def __init__(self, channels: int, key_channels: int, drop_rate: float, **dd: Any) -> None:
        super().__init__()
        self.object_context_block = _ObjectAttention(channels, key_channels, **dd)
        self.conv_bn_dropout = nn.Sequential(*_project(2 * channels, channels, **dd), nn.Dropout2d(drop_rate))

    def forward(self, features: Tensor, objects: Tensor) -> Tensor:
        context = self.object_context_block(features, objects)
        return self.conv_bn_dropout(torch.cat([context, features], 1))


def _classifier(in_channels: int, num_classes: int, **dd: Any) -> nn.Module:
    return nn.Conv2d(in_channels, num_classes, 1, **dd) if num_classes else nn.Identity()


class ObjectContextHead(nn.Module):
    """OCR: a first guess of the classes gathers their representations, which then tell each pixel what it belongs to.

    Args:
        in_channels: sum over the maps of the backbone.
        num_classes: of the prediction; 0 for none, the head then gives features.
        num_regions: of the first guess.
        channels: of the pixels' features.
        key_channels: width of the attention from pixels to objects.
        drop_rate: dropout of whole channels before the classifier.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_regions: int,
        channels: int = 512,
        key_channels: int = 256,
        drop_rate: float = 0.05,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.channels = channels
        self.conv3x3_ocr = nn.Sequential(PyramidConv2d(in_channels, channels, 3, **dd), _norm_relu(channels, **dd))
        self.aux_head = nn.Sequential(
            PyramidConv2d(in_channels, in_channels, 1, **dd),
            _norm_relu(in_channels, **dd),
            nn.Conv2d(in_channels, num_regions, 1, **dd),
        )
        self.ocr_gather_head = _Gather()
        self.ocr_distri_head = _Distribute(channels, key_channels, drop_rate, **dd)
        self.cls_head = _classifier(channels, num_classes, **dd)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh classifiers, of the prediction and of the first guess; 0 only removes the former."""
        dd: Any = get_device_dtype(self)
        self.cls_head = _classifier(self.channels, num_classes, **dd).train(self.training)
        if num_classes:
            self.aux_head[2] = nn.Conv2d(self.in_channels, num_classes, 1, **dd).train(self.training)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps to the pixels' features `[B, channels, h, w]` and the first guess `[B, num_regions, h, w]`.

        The classifier, `cls_head`, is left to the caller.
        """
        features = self.conv3x3_ocr(maps)
        regions = self.aux_head(maps)
        return self.ocr_distri_head(features, self.ocr_gather_head(features, regions)), regions


class ScaleAttention(nn.Module):
    """How far the prediction at this scale is to be trusted at each place, against that of the next higher scale.

    Args:
        in_channels: of the features.
        channels: between the convolutions.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, in_channels: int, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv0 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False, **dd)
        self.bn0 = nn.BatchNorm2d(channels, **dd)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.conv2 = nn.Conv2d(channels, 1, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, 1, h, w]`, values in (0, 1)."""
        x = self.bn0(self.conv0(x)).relu()
        x = self.bn1(self.conv1(x)).relu()
        return self.conv2(x).sigmoid()


def fuse_scales(scales: Sequence[float], maps: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """Predictions at several scales to one, from the highest down (Tao et al., section 3.2).

    With a the attention of the lower scale s: `a · lower + (1 - a) · down(fused)` for s ≥ 1, and
    `up(a · lower) + (1 - up(a)) · fused` for s < 1.

    Args:
        scales: in falling order.
        maps: one a scale, `[B, K, s H, s W]`.
        attention: one a scale, `[B, 1, s H, s W]`; that of the highest is not used.

    Returns:
        `[B, K, H, W]` if 1 is among the scales; else at the lowest scale above 1, or the highest below.
    """
    fused = maps[0]
    for scale, lower, weight in zip(scales[1:], maps[1:], attention[1:], strict=True):
        if scale >= 1:
            fused = weight * lower + (1 - weight) * resize_maps(fused, lower.shape[-2:])
        else:
            size = fused.shape[-2:]
            fused = resize_maps(weight * lower, size) + (1 - resize_maps(weight, size)) * fused
    return fused
