"""What networks that give a class to each pixel share: their surface, inference over large pictures, the loss.

Inference slides a window over pictures larger than the network was trained on and averages what overlaps, as first done
by OverFeat (Sermanet et al., https://arxiv.org/abs/1312.6229) and today by every segmentation toolbox. The classes and
colours of Cityscapes are those of its label definition (https://www.cityscapes-dataset.com, 19 classes that count).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vision.pyramid import imagenet_cfg

__all__ = [
    "CITYSCAPES_CLASSES",
    "PixelClass",
    "Segmenter",
    "cityscapes_cfg",
    "palette",
    "resize_maps",
    "scale_images",
    "segmentation_loss",
    "sliding_window",
]


class PixelClass(NamedTuple):
    """A class of pixels."""

    name: str
    color: tuple[int, int, int]
    """RGB, 0 to 255."""


CITYSCAPES_CLASSES = (
    PixelClass("road", (128, 64, 128)),
    PixelClass("sidewalk", (244, 35, 232)),
    PixelClass("building", (70, 70, 70)),
    PixelClass("wall", (102, 102, 156)),
    PixelClass("fence", (190, 153, 153)),
    PixelClass("pole", (153, 153, 153)),
    PixelClass("traffic light", (250, 170, 30)),
    PixelClass("traffic sign", (220, 220, 0)),
    PixelClass("vegetation", (107, 142, 35)),
    PixelClass("terrain", (152, 251, 152)),
    PixelClass("sky", (70, 130, 180)),
    PixelClass("person", (220, 20, 60)),
    PixelClass("rider", (255, 0, 0)),
    PixelClass("car", (0, 0, 142)),
    PixelClass("truck", (0, 0, 70)),
    PixelClass("bus", (0, 60, 100)),
    PixelClass("train", (0, 80, 100)),
    PixelClass("motorcycle", (0, 0, 230)),
    PixelClass("bicycle", (119, 11, 32)),
)
"""In the order of the 19 evaluated classes ("train ids"), as published networks number them."""


def cityscapes_cfg(weights_name: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """The `default_cfgs` entry of a network trained on Cityscapes.

    Args:
        weights_name: the checkpoint's entry in the manifest; None for a network without published weights.
        **kwargs: `input_size`, `pool_size`, `first_conv`, `classifier`, and what is different.
    """
    return imagenet_cfg(
        weights_name,
        **{
            "num_classes": len(CITYSCAPES_CLASSES),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "label_names": [entry.name for entry in CITYSCAPES_CLASSES],
            **kwargs,
        },
    )


def palette(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """A colour for each class: the one that Cityscapes gives it, or one that no other class has.

    Args:
        names: of the classes.

    Returns:
        RGB, 0 to 255, as many as `names`; the same names always give the same colours.
    """
    known = {entry.name: entry.color for entry in CITYSCAPES_CLASSES}
    taken = {known[name] for name in names if name in known}
    fresh = (color for color in map(_spread_color, range(1, 1 << 24)) if color not in taken)
    return [known[name] if name in known else next(fresh) for name in names]


def _spread_color(index: int) -> tuple[int, int, int]:
    """The bits of a number dealt out to red, green and blue, lowest into highest: near numbers lie far apart."""
    red, green, blue = (sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
    return red, green, blue


class Segmenter(nn.Module, ABC):
    """A network that gives a class to each pixel; with timm's names for what it has in common with classifiers.

    A subclass sets `num_classes`, `num_features`, `head_hidden_size`, `in_chans`, and says what its features and its
    head are. What inference needs beyond weights are the attributes below; a subclass or an instance may change them.
    """

    num_classes: int
    """Channels of the logits."""
    num_features: int
    """Channels of `forward_features`, of the last map if there are several."""
    head_hidden_size: int
    """Channels that enter the classifier."""
    in_chans: int
    """Channels of the images."""
    feature_info: list[dict]
    """Of each map of `forward_features`: `num_chs`, `reduction`, `module`."""

    window: tuple[int, int] | None = None
    """Height and width of the crops that `predict` takes of larger pictures; None: always the whole picture."""
    stride: tuple[int, int] | None = None
    """Step from crop to crop; None: as `window`, without overlap."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes, as factors of the picture's own, that `predict` combines."""

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        """Normalised images `[B, in_chans, H, W]` to what `forward_head` takes: a map, or a list of maps."""

    @abstractmethod
    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        """Features to logits `[B, num_classes, h, w]` at the head's own stride.

        With `pre_logits` to what would enter the classifier, `[B, head_hidden_size, h, w]`.
        """

    @abstractmethod
    def get_classifier(self) -> nn.Module:
        """The last layer, a 1x1 convolution; `nn.Identity` where there is none."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a fresh classifier on top.

        Args:
            num_classes: 0 removes the classifier.
            global_pool: as timm's classifiers take it; there is nothing to pool here.

        Raises:
            ValueError: a `global_pool` other than None and ''.
        """
        if global_pool:
            raise ValueError(f"global_pool={global_pool!r}: each pixel is classified; only None and '' fit.")
        self.num_classes = num_classes
        self.set_classifier(num_classes)

    @abstractmethod
    def set_classifier(self, num_classes: int) -> None:
        """Puts a fresh classifier on top, none for 0."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks in the backward pass instead of keeping their activations."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor | list[Tensor], list[Tensor]]:
        """The maps that the head works on; they come out together.

        Args:
            x: images, `[B, in_chans, H, W]`.
            indices: maps to return: all for None, the last n for a number n, or a list of indices.
            norm: no effect; there is no final norm.
            stop_early: no effect.
            output_fmt: only 'NCHW'.
            intermediates_only: leave out the features.

        Returns:
            The list of maps, or with the features (all maps) before it.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW'.")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        features = self.forward_features(x)
        maps = [features[i] for i in take]
        return maps if intermediates_only else (features, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        """Removes what the maps asked for do not need, which is the head; returns their indices.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: no effect.
            prune_head: remove the head; only features and intermediates can be had then.
        """
        take, _ = feature_take_indices(len(self.feature_info), indices)
        if prune_head:
            self.num_classes = 0
            self.remove_head()
        return take

    @abstractmethod
    def remove_head(self) -> None:
        """Forgets all that stands behind `forward_features`."""

    def set_input_size(self, img_size: int | tuple[int, int] | None) -> None:
        """Records the image size that the network is meant for; no weight depends on it.

        Args:
            img_size: `(height, width)` or one number for both, in pixels; None for the size of the pretrained weights.
        """
        update_model_input_size(self, img_size)

    def no_weight_decay(self) -> set[str]:
        """Parameters beyond the 1-D ones that must not decay: none."""
        return set()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[B, in_chans, H, W]` to logits `[B, num_classes, H, W]`, one pass at the size given."""
        return resize_maps(self.forward_head(self.forward_features(x)), x.shape[-2:])

    def forward_scales(self, x: Tensor, scales: Sequence[float]) -> Tensor:
        """One prediction of several passes at several sizes.

        Here the mean of their probabilities; a network that has learnt how to weigh the sizes does better.

        Args:
            x: normalised images, `[B, in_chans, H, W]`.
            scales: factors on H and W.

        Returns:
            Logits `[B, num_classes, H, W]`.
        """
        size = x.shape[-2:]
        logits = [resize_maps(self(x if scale == 1 else scale_images(x, scale)), size) for scale in scales]
        if len(logits) == 1:
            return logits[0]
        return torch.stack([one.log_softmax(1) for one in logits]).logsumexp(0)

    def predict(self, images: Tensor, scales: Sequence[float] | None = None) -> Tensor:
        """Logits as the published accuracy was measured: all `scales`, crop by crop where there is a `window`.

        Memory beyond that of one crop is that of the result. Gradients flow, so wrap in `torch.inference_mode()`.

        Args:
            images: normalised, `[B, in_chans, H, W]`.
            scales: instead of the network's own.

        Returns:
            `[B, num_classes, H, W]`.

        Raises:
            ValueError: a scale that is not positive, or none.
        """
        chosen = tuple(self.scales if scales is None else scales)
        if not chosen or min(chosen) <= 0:
            raise ValueError(f"scales={chosen}: expected one or more positive factors, such as (0.5, 1.0, 2.0).")

        def segment(crops: Tensor) -> Tensor:
            return self.forward_scales(crops, chosen)

        return segment(images) if self.window is None else sliding_window(segment, images, self.window, self.stride)


@torch.fx.wrap
@register_notrace_function
def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with pixel centres that keep their place; the same tensor if it has that size already.

    Args:
        maps: `[B, C, h, w]`.
        size: height and width.

    Returns:
        `[B, C, *size]`.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, (size[0], size[1]), mode="bilinear", align_corners=False)


@torch.fx.wrap
@register_notrace_function
def scale_images(images: Tensor, scale: float) -> Tensor:
    """Images at another size, at least one pixel: `[B, C, H, W]` to `[B, C, ⌊scale·H⌋, ⌊scale·W⌋]`, bilinear."""
    return resize_maps(images, [max(int(side * scale), 1) for side in images.shape[-2:]])


def sliding_window(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Logits of pictures that are larger than what a network takes, crop by crop; where crops overlap, their mean.

    Crops lie on a grid from the top left; the last of a row or column is moved back to end at the border. One place of
    the grid is done for all pictures of the batch at a time, so memory is that of one call plus the result. A picture
    that fits the window is one ordinary call.

    Args:
        model: `[B, C, h, w]` to `[B, K, h, w]`.
        images: `[B, C, H, W]`.
        window: height and width of a crop; a picture's own where that is smaller.
        stride: from crop to crop, along height and width; None for `window`.

    Returns:
        `[B, K, H, W]`.

    Raises:
        ValueError: a window that is not positive, or a stride beyond it, which would leave gaps.
    """
    stride = window if stride is None else stride
    if any(w < 1 or not 1 <= s <= w for w, s in zip(window, stride, strict=True)):
        raise ValueError(f"window={window}, stride={stride}: expected 1 ≤ stride ≤ window in both directions.")
    rows, columns = (_starts(side, w, s) for side, w, s in zip(images.shape[-2:], window, stride, strict=True))
    if len(rows) == len(columns) == 1:
        return model(images)
    total: Tensor | None = None
    covered = images.new_zeros(images.shape[-2:])
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(images[place])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[place] += logits
            covered[place] += 1
    assert total is not None
    return total / covered.to(total.dtype)


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where crops begin along one side."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def segmentation_loss(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy, mean over the pixels that have a class.

    Args:
        logits: `[B, num_classes, h, w]`; brought to the target's size, bilinear, if they are smaller.
        target: `[B, H, W]`, int64, class indices.
        ignore_index: marks pixels without a class.

    Returns:
        Scalar; 0 where no pixel has a class.

    Raises:
        ValueError: a target that is no class map of this batch.
    """
    if target.ndim != 3 or len(target) != len(logits) or target.is_floating_point():
        raise ValueError(
            f"target of shape {tuple(target.shape)}, {target.dtype}, for logits {tuple(logits.shape)}; expected class "
            f"indices ({len(logits)}, H, W)."
        )
    logits = resize_maps(logits, target.shape[-2:])
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return loss / (target != ignore_index).sum().clamp(min=1)
