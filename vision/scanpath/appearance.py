"""What objects look like: crops of a picture, and networks that make a vector of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Normalize

from vision.scanpath.objects import Objects

__all__ = ["CropCNN", "Crops", "FrozenBackbone", "SpatialPyramidPool", "cut"]

Crops = Tensor | Sequence[Tensor]
"""RGB from 0 to 1: `[M, 3, H, W]`, or of unequal sizes M of `[3, H, W]`."""


def cut(
    picture: Image.Image, objects: Objects, size: tuple[int, int] | None = (150, 93), min_side: int = 24
) -> Tensor | list[Tensor]:
    """The objects of a picture, cut out of it.

    Args:
        picture: of the objects' size.
        objects: where they are; boxes need not be whole pixels.
        size: height and width that each is resized to; None to leave each its own.
        min_side: without `size`, smaller crops are enlarged so that their shorter side has that many pixels.

    Returns:
        `[N, 3, H, W]`, float32, RGB from 0 to 1; without `size` a list of `[3, H, W]`.

    Raises:
        ValueError: a picture of another size.
    """
    if picture.size != tuple(objects.size):
        raise ValueError(f"a picture of {picture.size} pixels, and objects of one of {tuple(objects.size)}.")
    picture = picture.convert("RGB")
    crops = []
    for left, upper, right, lower in objects.boxes.tolist():
        height, width = size or _own_size(lower - upper, right - left, min_side)
        crop = picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, upper, right, lower))
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255)  # [3, H, W]
    return crops if size is None else torch.stack(crops)


def _own_size(height: float, width: float, min_side: int) -> tuple[int, int]:
    scale = max(1.0, min_side / min(height, width))
    return max(min_side, round(height * scale)), max(min_side, round(width * scale))


class SpatialPyramidPool(nn.Module):
    """Maxima over grids of several sizes, so that a map of any size becomes a vector of one (He et al., ECCV 2014).

    Args:
        levels: cells along each side, one grid for each.

    Raises:
        ValueError: no level, or one below 1.
    """

    def __init__(self, levels: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        if not levels or min(levels) < 1:
            raise ValueError(f"pyramid={tuple(levels)}: expected sizes of grids, from 1, such as (1, 2, 4).")
        self.pools = nn.ModuleList(nn.AdaptiveMaxPool2d(level) for level in levels)
        self.cells = sum(level**2 for level in levels)

    def forward(self, x: Tensor) -> Tensor:
        """`[M, C, H, W]` → `[M, C · cells]`."""
        return torch.cat([pool(x).flatten(1) for pool in self.pools], 1)


class CropCNN(nn.Module):
    """OAT's network for crops: two convolutions with ReLU and max pooling, then a linear layer. Trained from scratch.

    Args:
        dim: C.
        crop_size: height and width of the crops. 150 x 93 gives maps of 9 x 5.
        channels: of the two convolutions, which are 5x5 and 3x3, without padding.
        pools: sizes of the two poolings; smaller ones for smaller crops.
        pyramid: levels of a spatial pyramid in place of the second pooling, for crops of any sizes; None for one size.

    Raises:
        ValueError: crops that are too small for the poolings.
    """

    def __init__(
        self,
        dim: int = 256,
        crop_size: tuple[int, int] = (150, 93),
        channels: tuple[int, int] = (16, 32),
        pools: tuple[int, int] = (5, 3),
        pyramid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.crop_size, self.pools, self.has_pyramid = crop_size, pools, pyramid is not None
        self.conv1 = nn.Conv2d(3, channels[0], 5)
        self.pool1 = nn.MaxPool2d(pools[0])
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3)
        if pyramid is not None:
            self.pool2: nn.Module = SpatialPyramidPool(pyramid)
            cells = SpatialPyramidPool(pyramid).cells
        else:
            self.pool2 = nn.Sequential(nn.MaxPool2d(pools[1]), nn.Flatten())
            height, width = (((side - 4) // pools[0] - 2) // pools[1] for side in crop_size)
            if min(height, width) < 1:
                raise ValueError(f"crop_size={crop_size} is too small for pools={pools}; take smaller pools.")
            cells = height * width
        self.proj = nn.Linear(channels[1] * cells, dim)

    def forward(self, crops: Crops) -> Tensor:
        """Vectors of crops.

        Args:
            crops: RGB from 0 to 1, `[M, 3, H, W]`; with a pyramid also M of `[3, H, W]`.

        Returns:
            `[M, C]`.

        Raises:
            ValueError: crops of another size than `crop_size`; with a pyramid, too small ones.
        """
        return self.proj(torch.cat([self._features(batch) for batch in _batches(crops)]))

    def _features(self, crops: Tensor) -> Tensor:
        height, width = crops.shape[-2:]
        if not self.has_pyramid and (height, width) != tuple(self.crop_size):
            raise ValueError(f"crops of {height} x {width}: expected {self.crop_size}; with a pyramid any will do.")
        if (smallest := 3 * self.pools[0] + 4) > min(height, width) and self.has_pyramid:
            raise ValueError(f"a crop of {height} x {width}: expected {smallest} or more along each side; enlarge it.")
        x = (2 * crops - 1).contiguous(memory_format=torch.channels_last)  # grey is 0
        x = self.pool1(self.conv1(x)).relu()  # as the other way round, on fewer numbers
        return self.pool2(self.conv2(x)).relu()


class FrozenBackbone(nn.Module):
    """Features of a network of timm that is not trained, and a linear layer that is.

    Args:
        name: a model of timm with `features_only`; those of `vision` are among them.
        dim: C.
        pyramid: levels of the spatial pyramid over its last map.
        pretrained: fetch its published weights. Not needed before `load_state_dict`, which brings them.
    """

    def __init__(self, name: str, dim: int = 256, pyramid: Sequence[int] = (1, 2), pretrained: bool = False) -> None:
        super().__init__()
        self.backbone: Any = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-1,))
        self.backbone.requires_grad_(False).eval()
        self.pool = SpatialPyramidPool(pyramid)
        self.proj = nn.Linear(self.backbone.feature_info.channels()[-1] * self.pool.cells, dim)
        mean, std = (self.backbone.pretrained_cfg[key] for key in ("mean", "std"))
        self.normalize = Normalize(mean, std)

    def train(self, mode: bool = True) -> FrozenBackbone:
        """As of any module, but the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, crops: Crops) -> Tensor:
        """RGB crops from 0 to 1, `[M, 3, H, W]` or M of `[3, H, W]`, of sizes that the backbone takes → `[M, C]`."""
        return self.proj(torch.cat([self._features(batch) for batch in _batches(crops)]))

    @torch.no_grad()
    def _features(self, crops: Tensor) -> Tensor:
        (x,) = self.backbone(self.normalize(crops))
        if self.backbone.output_fmt == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return self.pool(x)


def _batches(crops: Crops) -> Iterator[Tensor]:
    """Batches `[M, 3, H, W]`: one, or one for each of the crops of unequal sizes."""
    for batch in (crops,) if isinstance(crops, Tensor) else crops:
        batch = batch if isinstance(crops, Tensor) else batch[None]
        if batch.ndim != 4 or batch.shape[1] != 3:
            shape = list(batch.shape) if isinstance(crops, Tensor) else list(batch.shape[1:])
            raise ValueError(f"crops: expected [M, 3, H, W], or M of [3, H, W], got {shape}.")
        yield batch
