"""FAN for segmentation: the hybrid with TAP as trained on Cityscapes, under the all-MLP head of SegFormer.

The published network (Guo et al., ICCV 2023, https://arxiv.org/abs/2303.11126) with the head of "SegFormer" (Xie et
al., NeurIPS 2021, https://arxiv.org/abs/2105.15203). Checked against outputs of the authors' code (MIT,
https://github.com/guoyongcs/TAPADL). What differs from it:

* crops of any shape;
* the head never builds the map of all four levels side by side: what it does to each is linear, so each goes through at
  its own size and is enlarged afterwards, with the same sum;
* weights that nothing depends on are left out: `conv_seg` of the head, and of class attention all that is for the class
  token, which this network has no use for.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

import weights
from vision.fan import fan
from vision.fan.fan import FAN
from vision.segmentation import Segmenter, cityscapes_cfg, resize_maps

__all__ = ["FANSegmenter", "MLPHead"]


@register_notrace_module
class _ManyFrequencies(nn.Module):
    """XCiT's position code, but every sine and cosine has a frequency of its own; called as that is."""

    def __init__(self, dim: int, hidden_dim: int = 32, device=None, dtype=None) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.token_projection = nn.Conv2d(2 * hidden_dim, dim, 1, device=device, dtype=dtype)

    def forward(self, B: int, H: int, W: int) -> Tensor:
        """`[B, C, H, W]`."""
        weight = self.token_projection.weight
        exponent = torch.arange(self.hidden_dim, device=weight.device, dtype=torch.float32) / self.hidden_dim
        codes = []
        for side in (H, W):
            places = torch.arange(1, side + 1, device=weight.device, dtype=torch.float32) / (side + 1e-6)
            angles = 2 * math.pi * places.unsqueeze(1) / 10000**exponent  # [side, hidden_dim]
            codes.append(torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), -1).flatten(1))
        y, x = codes[0].unsqueeze(1).expand(-1, W, -1), codes[1].expand(H, -1, -1)
        code = torch.cat((y, x), -1).permute(2, 0, 1).unsqueeze(0)  # [1, 2 * hidden_dim, H, W]
        return self.token_projection(code.to(weight.dtype)).expand(B, -1, -1, -1)


class _PatchTokens(nn.Module):
    """What a class attention block does to all tokens but the class token: `2 · LN2(x + gamma1 · LN1(x))`."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.gamma1 = nn.Parameter(torch.ones(dim, **dd))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`."""
        return 2 * self.norm2(x + self.gamma1 * self.norm1(x))


class _Projection(nn.Module):
    """A linear layer under the authors' name."""

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, device=device, dtype=dtype)


class _Fusion(nn.Module):
    """A 1x1 convolution and its BatchNorm, under the authors' names."""

    def __init__(self, in_chans: int, out_chans: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 1, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_chans, device=device, dtype=dtype)


class MLPHead(nn.Module):
    """SegFormer's head: a linear layer for each of four maps, all at the first one's size, fused and classified.

    `relu(BN(W_f [resize(W_4 c_4), …, resize(W_1 c_1)]))`, written as a sum over maps in which `W_f W_i` is one matrix
    that works at the size of c_i. Names in the state dict are the authors' (from mmsegmentation).

    Args:
        in_channels: of the four maps, from fine to coarse.
        num_classes: 0 for no classifier.
        embed_dim: width of the fused map.
        drop_rate: dropout of whole channels before the classifier.
    """

    def __init__(
        self,
        in_channels: tuple[int, int, int, int],
        num_classes: int = 19,
        embed_dim: int = 768,
        drop_rate: float = 0.1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.linear_c4, self.linear_c3, self.linear_c2, self.linear_c1 = (
            _Projection(channels, embed_dim, **dd) for channels in reversed(in_channels)
        )
        self.linear_fuse = _Fusion(4 * embed_dim, embed_dim, **dd)
        self.dropout = nn.Dropout2d(drop_rate)
        self.linear_pred: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier; none for 0."""
        dd: dict[str, Any] = get_device_dtype(self)
        self.linear_pred = nn.Conv2d(self.embed_dim, num_classes, 1, **dd) if num_classes else nn.Identity()
        if isinstance(self.linear_pred, nn.Conv2d):
            trunc_normal_(self.linear_pred.weight, std=0.02)
            nn.init.zeros_(self.linear_pred.get_parameter("bias"))
        self.linear_pred.train(self.training)

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Four maps, from fine to coarse, to `[B, embed_dim, h, w]` at the size of the first."""
        size = maps[0].shape[-2:]
        projections = (self.linear_c4.proj, self.linear_c3.proj, self.linear_c2.proj, self.linear_c1.proj)
        shares = self.linear_fuse.conv.weight.flatten(1).chunk(4, 1)  # [embed_dim, embed_dim] each
        fused = None
        for x, linear, share in zip(reversed(maps), projections, shares, strict=True):
            weight, bias = share @ linear.weight, share @ linear.bias
            x = resize_maps(F.conv2d(x, weight[:, :, None, None], bias), size)
            fused = x if fused is None else fused + x
        assert fused is not None
        return self.dropout(F.relu(self.linear_fuse.bn(fused)))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps, from fine to coarse, to logits `[B, num_classes, h, w]` at the size of the first."""
        return self.linear_pred(self.fuse(maps))


class FANSegmenter(Segmenter):
    """A hybrid FAN with two ConvNeXt stages, and SegFormer's head on four of its maps.

    Strides 4 and 8 after the stages, 16 after the last block, and that once more after the norms of class attention.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier: features of the pixels come out.
        img_size: recorded for preprocessing; no weight depends on it.
        embed_dim: width of the tokens.
        head_dim: width of the head.
        cls_attn_layers: number of class attention blocks.
        drop_rate: dropout of whole channels before the classifier.
        device: of the parameters.
        dtype: of the parameters.
        **backbone_args: as `FAN` takes them.
    """

    window = (1024, 1024)
    stride = (768, 768)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 19,
        img_size: int | tuple[int, int] | None = None,
        embed_dim: int = 448,
        head_dim: int = 768,
        cls_attn_layers: int = 2,
        drop_rate: float = 0.1,
        device=None,
        dtype=None,
        **backbone_args: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.backbone = FAN(
            in_chans, 0, embed_dim=embed_dim, hybrid_depths=(3, 3), cls_attn_layers=0, **backbone_args, **dd
        )
        self.backbone.prune_intermediate_layers([-1], prune_norm=True)
        self.backbone.pos_embed = _ManyFrequencies(dim=embed_dim, **dd)
        self.cls_attn_blocks = nn.Sequential(*(_PatchTokens(embed_dim, **dd) for _ in range(cls_attn_layers)))
        places = (
            (128, 4, "backbone.patch_embed.backbone.stages.0"),
            (256, 8, "backbone.patch_embed.backbone.stages.1"),
        )
        places += ((embed_dim, 16, "backbone.blocks"), (embed_dim, 16, "cls_attn_blocks"))
        self.feature_info = [{"num_chs": c, "reduction": r, "module": module} for c, r, module in places]
        self.num_features = embed_dim
        self.head_hidden_size = head_dim
        self.decode_head = MLPHead((128, 256, embed_dim, embed_dim), num_classes, head_dim, drop_rate, **dd)
        self.set_input_size(img_size)

    def get_classifier(self) -> nn.Module:
        return self.decode_head.linear_pred

    def set_classifier(self, num_classes: int) -> None:
        self.decode_head.reset_classifier(num_classes)

    def remove_head(self) -> None:
        self.decode_head: Any = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers for layer-wise learning rates: the stem, then each block, then the head."""
        return {"stem": r"^backbone\.(?:patch_embed|pos_embed)", "blocks": r"^backbone\.blocks\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """The projection of positions."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Images `[B, in_chans, H, W]` to four maps, at strides 4, 8, 16 and 16."""
        maps = self.backbone.forward_intermediates(x, [0, 1, -1], intermediates_only=True)
        assert isinstance(maps, list)
        last = maps[-1]
        tokens = self.cls_attn_blocks(last.flatten(2).transpose(1, 2))
        return [*maps, tokens.transpose(1, 2).unflatten(2, last.shape[-2:])]

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The four maps to logits `[B, num_classes, H / 4, W / 4]`."""
        return self.decode_head.fuse(features) if pre_logits else self.decode_head(features)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """The published file's nesting taken off, and weights left out that nothing depends on.

    Args:
        state_dict: the content of the published file (state dict under "state_dict"), or a state dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    converted = {}
    for name, tensor in fan.checkpoint_filter_fn(state_dict, model).items():
        if name.startswith(("backbone.cls_token", "decode_head.conv_seg.")):
            continue
        if name.startswith("backbone.cls_attn_blocks."):
            name = name.removeprefix("backbone.")
            if not name.split(".")[2].startswith(("norm", "gamma1")):
                continue
        converted[name] = tensor
    return converted


default_cfgs = generate_default_cfgs(
    {
        "tap_fan_base_16_p4_hybrid_seg.cityscapes": cityscapes_cfg(
            "tap_fan_base_16_p4_hybrid_seg.cityscapes",
            input_size=(3, 1024, 1024),
            pool_size=(256, 256),
            first_conv="backbone.patch_embed.backbone.stem.0",
            classifier="decode_head.linear_pred",
        )
    }
)


@register_model
def tap_fan_base_16_p4_hybrid_seg(pretrained: bool = False, **kwargs) -> FANSegmenter:
    """FAN-B-Hybrid with token-aware pooling under SegFormer's head: 82.9 % mIoU on Cityscapes as published."""
    defaults = {"embed_dim": 448, "depth": 16, "num_heads": 8, "num_scales": 4}
    return weights.build_model(
        FANSegmenter,
        "tap_fan_base_16_p4_hybrid_seg",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )
