"""Polarized self-attention: where and what, each at full resolution in one direction and collapsed in the other.

Paper: Liu, Liu, Fan and Huang, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
https://arxiv.org/abs/2107.00782. Original code: https://github.com/DeLightCMU/PSA (Apache-2.0).

* `attention`: the layer;
* `psa`: ResNets and HRNets with it;
* `ocr`, `hrnet_ocr`: the head and the segmentation network that the authors published, with its training objective.

What differs from that code:

* The products are taken in another order, with the same result up to rounding: a 1x1 convolution commutes with a
  (weighted) mean over places, so three convolutions that were run at every place are run once an image. In the parallel
  layout nothing wider than one channel is left at every place, in the sequential one a single convolution.
* `form="paper"` computes the spatial mask as the paper writes it. The released weights belong to `form="released"`,
  whose mask hardly varies over a large map (the softmax over places stands inside the sigmoid).
* HRNet, ResNet and their blocks are timm's; this package adds the layer to them. Maps of any size go through the fusion
  of HRNet, which in timm needs multiples of 32.
"""

from vision.psa.attention import Form, Layout, PolarizedMasks, PolarizedSelfAttention, polarized_masks
from vision.psa.hrnet_ocr import MultiScaleLoss, MultiScaleOutput, PolarizedHRNetOCR, ScalePrediction
from vision.psa.ocr import ObjectContextHead, PyramidConv2d, ScaleAttention, fuse_scales
from vision.psa.psa import (
    Placement,
    PolarizedBasicBlock,
    PolarizedBottleneck,
    PolarizedHRNet,
    PolarizedHRNetFeatures,
    PolarizedResNet,
    checkpoint_filter_fn,
)

__all__ = [
    "Form",
    "Layout",
    "MultiScaleLoss",
    "MultiScaleOutput",
    "ObjectContextHead",
    "Placement",
    "PolarizedBasicBlock",
    "PolarizedBottleneck",
    "PolarizedHRNet",
    "PolarizedHRNetFeatures",
    "PolarizedHRNetOCR",
    "PolarizedMasks",
    "PolarizedResNet",
    "PolarizedSelfAttention",
    "PyramidConv2d",
    "ScaleAttention",
    "ScalePrediction",
    "checkpoint_filter_fn",
    "fuse_scales",
    "polarized_masks",
]
