"""FAN: vision transformers whose channels attend too, with and without token-aware pooling (TAP).

Papers: "Understanding The Robustness in Vision Transformers", Zhou et al., ICML 2022, https://arxiv.org/abs/2204.12451
(fully attentional networks, FAN); "Robustifying Token Attention for Vision Transformers", Guo et al., ICCV 2023,
https://arxiv.org/abs/2303.11126 (TAP). The code of the latter (MIT): https://github.com/guoyongcs/TAPADL.

Written from the papers and checked against outputs of the authors' code. FAN is an XCiT of other blocks, so what it
shares with that (patches, positions, local patch interaction, class attention) is timm's. What differs from the code:

* any image size, square or not;
* nothing depends on the memory layout of tensors: see `LayerNorm2dUnbiased`;
* channel processing works on `[B, N, C]` throughout and transposes nothing.
"""

from vision.fan.fan import FAN, checkpoint_filter_fn
from vision.fan.layers import ChannelProcessing, FANBlock, HybridEmbed, LayerNorm2dUnbiased, TokenMixing
from vision.fan.segmentation import FANSegmenter, MLPHead

__all__ = [
    "FAN",
    "ChannelProcessing",
    "FANBlock",
    "FANSegmenter",
    "HybridEmbed",
    "LayerNorm2dUnbiased",
    "MLPHead",
    "TokenMixing",
    "checkpoint_filter_fn",
]
