"""HRNet with polarized attention and object context, the segmentation network that the authors of PSA published.

Paper: Liu, Liu, Fan and Huang, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
https://arxiv.org/abs/2107.00782. Original code: https://github.com/DeLightCMU/PSA (Apache-2.0). The attention is in
`vision.psa.attention`, the head in `vision.psa.ocr`.

What differs from that code:

* The weights start as those of HRNet's classifiers do, not from a normal of deviation 0.001, which only serves to be
  overwritten by ImageNet weights.
* The region mutual information loss of the published schedule is left out; `MultiScaleLoss` is cross-entropy
  throughout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.models import generate_default_cfgs, register_model
from timm.models.hrnet import cfg_cls
from torch import Tensor, nn

import weights
from vision.criterion import StepLoss
from vision.inference import channels_last, in_parts
from vision.psa import psa
from vision.psa.attention import Form, Layout
from vision.psa.ocr import ObjectContextHead, ScaleAttention, fuse_scales
from vision.psa.psa import PolarizedHRNet
from vision.segmentation import Segmenter, cityscapes_cfg, resize_maps, scale_images, segmentation_loss

__all__ = ["MultiScaleLoss", "MultiScaleOutput", "PolarizedHRNetOCR", "ScalePrediction"]

_PIXELS_AT_ONCE = 4 * 224 * 224  # enough for matrix products at full speed
_REGIONS = 19  # of the first guess in a network that is built without classes


class ScalePrediction(NamedTuple):
    """What the network says about an image at one size."""

    scale: float
    """Factor on the image's size."""
    logits: Tensor
    """`[B, num_classes, scale H, scale W]`."""
    regions: Tensor
    """`[B, num_regions, h, w]`: the first guess, at the head's own stride."""
    attention: Tensor | None
    """`[B, 1, scale H, scale W]`; None where there is only one scale."""


class MultiScaleOutput(NamedTuple):
    """All that a training objective needs of a forward pass."""

    logits: Tensor
    """`[B, num_classes, H, W]`: the prediction."""
    aux_logits: Tensor
    """`[B, num_regions, H, W]`: the first guess, fused over scales as the prediction is."""
    predictions: tuple[ScalePrediction, ...]
    """One for each scale."""


class PolarizedHRNetOCR(Segmenter):
    """HRNet with polarized attention, object context and attention between scales.

    `forward` is what the authors train: the image and a smaller copy of it, fused. `predict` also takes a larger one,
    as their published accuracy does. Built with `multi_scale=False` it is their single-scale network: one pass, and no
    weights for attention between scales.

    Args:
        cfg: architecture of the backbone, as in `timm.models.hrnet.cfg_cls`.
        num_classes: 0 for no classifier: features of the pixels come out.
        in_chans: channels of the images.
        layout: as in `vision.psa.PolarizedSelfAttention`.
        form: as in `vision.psa.PolarizedSelfAttention`.
        channels: of the pixels' features.
        key_channels: width of the attention from pixels to objects.
        scale_channels: width of the attention between scales.
        multi_scale: whether there is that attention.
        low_scale: size of the smaller copy in `forward`, between 0 and 1.
        drop_rate: dropout of whole channels before the classifier.
        device: of the parameters.
        dtype: of the parameters.
        **backbone_args: as timm's `HighResolutionNet` takes them.

    Raises:
        ValueError: an option that is none.
    """

    window = (1024, 2048)
    stride = (768, 1536)

    def __init__(
        self,
        cfg: dict[str, Any],
        num_classes: int = 19,
        in_chans: int = 3,
        layout: Layout = "parallel",
        form: Form = "released",
        channels: int = 512,
        key_channels: int = 256,
        scale_channels: int = 256,
        multi_scale: bool = True,
        low_scale: float = 0.5,
        drop_rate: float = 0.05,
        device=None,
        dtype=None,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        if not 0 < low_scale < 1:
            raise ValueError(f"low_scale={low_scale}: expected a factor between 0 and 1.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.low_scale = low_scale
        self.scales = (0.5, 1.0, 2.0) if multi_scale else (1.0,)
        self.backbone = PolarizedHRNet(
            cfg, layout, form, "bilinear", in_chans=in_chans, head="maps", **dd, **backbone_args
        )
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**i, "module": f"backbone.stage4.branches.{i}"}
            for i, width in enumerate(self.backbone.stage4_cfg["num_channels"])
        ]
        self.num_features = sum(info["num_chs"] for info in self.feature_info)
        self.head_hidden_size = channels
        self.ocr: Any = ObjectContextHead(
            self.num_features, num_classes, num_classes or _REGIONS, channels, key_channels, drop_rate, **dd
        )
        self.scale_attn = ScaleAttention(channels, scale_channels, **dd) if multi_scale else None

    def get_classifier(self) -> nn.Module:
        return self.ocr.cls_head

    def set_classifier(self, num_classes: int) -> None:
        """A fresh one, and a fresh first guess of as many classes below it; 0 leaves the first guess as it is."""
        self.ocr.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers for layer-wise learning rates: the stem, then each module of the backbone, then the head."""
        return {
            "stem": r"^backbone\.(?:conv|bn)[12]",
            "blocks": r"^backbone\.(?:layer|transition|stage)(\d+)"
            if coarse
            else [
                (r"^backbone\.(?:layer|stage)(\d+)\.(\d+)", None),
                (r"^backbone\.transition(\d+)", (99999,)),
            ],
        }

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images `[B, in_chans, H, W]` to four maps at strides 4 to 32, together `num_features` wide."""
        return self.backbone.forward_features(channels_last(x))

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The four maps to logits `[B, num_classes, H / 4, W / 4]` of this one scale."""
        x, _ = self.ocr(features)
        return x if pre_logits else self.ocr.cls_head(x)

    def remove_head(self) -> None:
        self.ocr: Any = nn.Identity()
        self.scale_attn = None

    def predict_scale(self, x: Tensor, scale: float) -> ScalePrediction:
        """One pass over images `[B, in_chans, H, W]` at one size; `scale` is a factor on H and W."""
        if scale != 1:
            x = scale_images(x, scale)
        size = x.shape[-2:]
        features, regions = self.ocr(self.forward_features(x))
        attention = None if self.scale_attn is None else resize_maps(self.scale_attn(features), size)
        return ScalePrediction(scale, resize_maps(self.ocr.cls_head(features), size), regions, attention)

    def forward_scales(self, x: Tensor, scales: Sequence[float]) -> Tensor:
        """One prediction of several passes at several sizes, weighed by the learnt attention.

        Without that attention (`multi_scale=False`) the mean of their probabilities.

        Args:
            x: normalised images, `[B, in_chans, H, W]`.
            scales: factors on H and W.

        Returns:
            Logits `[B, num_classes, H, W]`.
        """
        if self.scale_attn is None:
            return super().forward_scales(x, scales)
        scales = sorted(scales, reverse=True)
        return in_parts(lambda part: self._fused(part, scales), x, _PIXELS_AT_ONCE * x.shape[1], self)

    def _fused(self, x: Tensor, scales: Sequence[float]) -> Tensor:
        predictions = [self.predict_scale(x, scale) for scale in scales]
        attention: Any = [prediction.attention for prediction in predictions]
        fused = fuse_scales(scales, [prediction.logits for prediction in predictions], attention)
        return resize_maps(fused, x.shape[-2:])

    def forward_detailed(self, x: Tensor) -> MultiScaleOutput:
        """`forward` with everything that a training objective needs."""
        size = x.shape[-2:]
        scales = [1.0] if self.scale_attn is None else [1.0, self.low_scale]
        predictions = tuple(self.predict_scale(x, scale) for scale in scales)
        attention: Any = [prediction.attention for prediction in predictions]
        aux = [resize_maps(p.regions, p.logits.shape[-2:]) for p in predictions]
        return MultiScaleOutput(
            resize_maps(fuse_scales(scales, [p.logits for p in predictions], attention), size),
            resize_maps(fuse_scales(scales, aux, attention), size),
            predictions,
        )

    def forward(self, x: Tensor, detailed: bool = False) -> Any:
        """Normalised images `[B, in_chans, H, W]` to logits `[B, num_classes, H, W]`, or with `detailed` to all parts.

        Args:
            x: the images.
            detailed: return a `MultiScaleOutput`.
        """
        if detailed is True:  # a symbolic trace puts something else in its place and gets the ordinary way
            return self.forward_detailed(x)
        if self.scale_attn is None:
            return in_parts(super().forward, x, _PIXELS_AT_ONCE * x.shape[1], self)
        return self.forward_scales(x, (1.0, self.low_scale))


class MultiScaleLoss(nn.Module):
    """The published objective with cross-entropy throughout: prediction, first guess, and each scale on its own.

    `main + aux_weight · aux + scale_weight · Σ_s scale_s`. The published schedule has a region mutual information loss
    for the first term, which is not here.

    Args:
        aux_weight: of the first guess.
        scale_weight: of each scale's own prediction; 0 leaves them out.
        ignore_index: marks pixels without a class.
    """

    def __init__(self, aux_weight: float = 0.4, scale_weight: float = 0.05, ignore_index: int = 255) -> None:
        super().__init__()
        self.aux_weight = aux_weight
        self.scale_weight = scale_weight
        self.ignore_index = ignore_index

    def forward(self, model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
        """One step.

        Args:
            model: a `PolarizedHRNetOCR`, also in a wrapper.
            images: normalised, `[B, C, H, W]`.
            target: `[B, H, W]`, int64, class indices.

        Returns:
            The loss, logits `[B, num_classes, H, W]`, and the terms `main`, `aux`, and for each scale `scale_0.5`.
        """
        output: MultiScaleOutput = model(images, detailed=True)
        loss = {
            "main": segmentation_loss(output.logits, target, self.ignore_index),
            "aux": segmentation_loss(output.aux_logits, target, self.ignore_index),
        }
        total = loss["main"] + self.aux_weight * loss["aux"]
        if self.scale_weight and len(output.predictions) > 1:
            for prediction in output.predictions:
                own = segmentation_loss(prediction.logits, target, self.ignore_index)
                loss[f"scale_{prediction.scale:g}"] = own
                total = total + self.scale_weight * own
        return StepLoss(total, output.logits.detach(), {name: part.detach() for name, part in loss.items()})


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """`vision.psa.checkpoint_filter_fn`; a single-scale network leaves out the attention between scales.

    Args:
        state_dict: the content of a published snapshot, or a state dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    state_dict = psa.checkpoint_filter_fn(state_dict, model)
    if getattr(model, "scale_attn", None) is not None:
        return state_dict
    return {name: value for name, value in state_dict.items() if not name.startswith("scale_attn.")}


def _cfg(weights_name: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return cityscapes_cfg(
        weights_name,
        **{
            "input_size": (3, 1024, 2048),
            "pool_size": (256, 512),
            "first_conv": "backbone.conv1",
            "classifier": ("ocr.cls_head", "ocr.aux_head.2"),
            **kwargs,
        },
    )


default_cfgs = generate_default_cfgs(
    {
        "psa_hrnet_w48_ocr.parallel_cityscapes": _cfg("psa_hrnet_w48_ocr.parallel_cityscapes"),
        "psa_hrnet_w48_ocr.sequential_cityscapes": _cfg("psa_hrnet_w48_ocr.sequential_cityscapes"),
        "psa_hrnet_nano_ocr": _cfg(input_size=(3, 256, 512), pool_size=(64, 128)),
    }
)


def _stage(num_branches: int, block_type: str = "BASIC", width: int = 8) -> dict[str, Any]:
    """One module of one block a branch, in timm's terms."""
    return {
        "num_modules": 1,
        "num_branches": num_branches,
        "block_type": block_type,
        "num_blocks": (1,) * num_branches,
        "num_channels": tuple(width * 2**i for i in range(num_branches)),
        "fuse_method": "SUM",
    }


_NANO = {"stem_width": 64, "stage1": _stage(1, "BOTTLENECK", 16), **{f"stage{n}": _stage(n) for n in (2, 3, 4)}}


def _create(variant: str, pretrained: bool, cfg: dict[str, Any], kwargs: dict[str, Any]) -> PolarizedHRNetOCR:
    return weights.build_model(
        PolarizedHRNetOCR,
        variant,
        pretrained,
        model_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def psa_hrnet_w48_ocr(pretrained: bool = False, **kwargs) -> PolarizedHRNetOCR:
    """HRNetV2-W48 with polarized attention and object context: 86.95 % mIoU on Cityscapes (parallel) as published."""
    return _create("psa_hrnet_w48_ocr", pretrained, cfg_cls["hrnet_w48"], kwargs)


@register_model
def psa_hrnet_nano_ocr(pretrained: bool = False, **kwargs) -> PolarizedHRNetOCR:
    """The same with narrow maps, for tests, teaching and small data; not in the paper."""
    defaults = {"channels": 32, "key_channels": 16, "scale_channels": 16}
    return _create("psa_hrnet_nano_ocr", pretrained, _NANO, {**defaults, **kwargs})
