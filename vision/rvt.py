"""RVT: a robust vision transformer of pooled features and convolutional MLPs, with token-aware pooling (TAP).

Papers: "Towards Robust Vision Transformer", Mao et al., CVPR 2022, https://arxiv.org/abs/2105.07926 (RVT);
"Robustifying Token Attention for Vision Transformers", Guo et al., ICCV 2023, https://arxiv.org/abs/2303.11126 (TAP).
The code of the latter (MIT): https://github.com/guoyongcs/TAPADL.

Written from the papers and checked against outputs of the authors' code. What differs from it:

* any image size, square or not; networks with attention masks ("plus") up to the size of their masks, which
  `set_input_size` makes larger;
* the maps stay `[B, H, W, C]` throughout, so that nothing is copied between convolutions and linear layers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

import weights
from vision.attention import AttentionTap, attend
from vision.inference import batch_norm, gelu, in_parts
from vision.pyramid import PyramidBackbone, imagenet_cfg
from vision.tap import TokenAwareAveragePooling

__all__ = ["RVT", "PositionAwareAttention", "RVTBlock", "checkpoint_filter_fn", "resize_mask"]

_MASK_GRID = (14, 14)  # of the published networks: 224 pixels
_PIXELS_AT_ONCE = 2 * 224 * 224  # in inference on a CPU: enough tokens for a matrix product, few enough for the cache


class PositionAwareAttention(nn.Module):
    """Multi-head self-attention whose scores are scaled by learnt positions: `softmax(σ(mask) ⊙ s q kᵀ) v`.

    The mask belongs to pairs of token numbers. A map of fewer tokens takes the upper left part of it, as the authors'
    code does, whatever the map's shape; for more tokens the mask has to be resized (`resize_to`).

    Args:
        dim: width C.
        num_heads: heads.
        mask_grid: height and width of the map that the mask is for; None for plain attention.

    Raises:
        ValueError: `dim` does not divide by `num_heads`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, mask_grid: tuple[int, int] | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide by num_heads={num_heads}.")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.mask_grid: tuple[int, int] | None = None
        self.register_parameter("att_mask", None)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.tap = AttentionTap()
        if mask_grid is not None:
            self.add_mask(mask_grid)

    def add_mask(self, grid: tuple[int, int]) -> None:
        """A fresh mask for a map of this height and width."""
        N = grid[0] * grid[1]
        self.att_mask = nn.Parameter(self.proj.weight.new_empty(self.num_heads, N, N))
        trunc_normal_(self.att_mask, std=0.02)
        self.mask_grid = grid

    def resize_to(self, grid: tuple[int, int]) -> None:
        """Resamples the mask for a larger map; leaves it as it is where the map's tokens have their part of it."""
        if self.att_mask is None or self.mask_grid is None or grid[0] * grid[1] <= self.att_mask.shape[1]:
            return
        resized = resize_mask(self.att_mask.detach(), self.mask_grid, grid)
        self.att_mask = nn.Parameter(resized, requires_grad=self.att_mask.requires_grad)
        self.mask_grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Attention over a map.

        Args:
            x: `[B, H, W, C]`.

        Returns:
            The same shape.

        Raises:
            ValueError: more tokens than the mask is for.
        """
        B, H, W, C = x.shape
        N = H * W
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.att_mask is None:
            x = attend(q, k, v, self.scale, tap=self.tap, key_grid=(H, W))
        else:
            if N > self.att_mask.shape[1]:
                raise ValueError(
                    f"a map of {H} x {W} tokens is larger than the attention mask of {self.att_mask.shape[1]}; call "
                    "set_input_size(img_size) of the network, or build it with img_size, to resample the mask."
                )
            scores = (self.scale * self.att_mask[:, :N, :N].sigmoid()) * (q @ k.mT)
            x = self.tap(scores.softmax(-1), (H, W)) @ v
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))


register_notrace_module(PositionAwareAttention)  # a decorator would hide its methods from type checkers


def resize_mask(mask: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """An attention mask for another map: keys, then queries, resampled bilinearly.

    Args:
        mask: `[heads, N, N]`, queries by keys, with N = H * W of `grid`.
        grid: height and width of the map that it is for.
        new_grid: those of the map that it shall be for.

    Returns:
        `[heads, M, M]`, with M = H * W of `new_grid`.

    Raises:
        ValueError: a mask that is not of `grid`.
    """
    if mask.shape[1:] != (grid[0] * grid[1],) * 2:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} is not for a map of {grid[0]} x {grid[1]} tokens.")
    for _ in range(2):  # the last axis is resampled and changes places with the one before
        mask = F.interpolate(mask.unflatten(2, grid), new_grid, mode="bilinear", align_corners=False).flatten(2).mT
    return mask.contiguous()


@register_notrace_module  # a trace would take the path of training, which rounds differently
class _ConvMlp(nn.Module):
    """Three convolutions with BatchNorm (1x1, depthwise 3x3, 1x1) and GELU between them, on `[B, H, W, C]`."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.bn2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu(batch_norm(F.linear(x, self.fc1.weight.flatten(1), self.fc1.bias), self.bn1))
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = gelu(batch_norm(x, self.bn2))
        return batch_norm(F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias), self.bn3)


class RVTBlock(nn.Module):
    """Pre-norm attention and convolutional MLP on `[B, H, W, C]`; TAP before the attention if asked for.

    Queries, keys and values are of pooled tokens, the shortcut is of the tokens themselves.

    Args:
        dim: width C.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over C.
        num_scales: of the pooling; 1 for none.
        mask_grid: as in `PositionAwareAttention`.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_scales: int = 4,
        mask_grid: tuple[int, int] | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dilation_predictor = TokenAwareAveragePooling(dim, num_scales, **dd) if num_scales > 1 else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = PositionAwareAttention(dim, num_heads, mask_grid, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = _ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        x = x + self.drop_path(self.attn(self.norm1(self.dilation_predictor(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    """Image to a map at stride 16: two convolutions with BatchNorm and a pooling between."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 32, 7, 2, padding=2, **dd),
            nn.BatchNorm2d(32, **dd),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(32, dim, 4, 4, **dd),
        )

    @staticmethod
    def grid(img_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the map that images of a size become."""
        h, w = (((side - 3) // 2 + 2) // 2 // 4 for side in img_size)
        return h, w

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).contiguous(memory_format=torch.channels_last)


class _Pool(nn.Module):
    """Half the map and twice the width by a depthwise convolution, `[B, C, H, W]` → `[B, 2 * C, ⌈H / 2⌉, ⌈W / 2⌉]`."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, 2, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Stage(nn.Module):
    """The blocks at one stride."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)


class RVT(PyramidBackbone):
    """RVT: stages of `RVTBlock`s, the first at stride 16; no position embedding and no class token.

    Takes any image size from 16 pixels on; see `PositionAwareAttention` for networks with masks. Since most variants
    have one stride only, it is the blocks that count as stages of a pyramid here (`features_only`,
    `forward_intermediates`, `stage_blocks`).

    Args:
        in_chans: channels of the images.
        num_classes: 0 for none.
        global_pool: a pooling of timm's `SelectAdaptivePool2d`; '' keeps the map. The norm comes after it.
        img_size: recorded for preprocessing; where that is more than 224 x 224 pixels, masks are made for it.
        base_dims: width of a head in each stage; the stage's width is this times `num_heads`, and twice the one before.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratio: hidden width of the MLPs over the stage's width.
        num_scales: of the token-aware average pooling (TAP) before each attention; 1 for none.
        masked_blocks: how many blocks of the first stage have an attention mask, counted from the first one.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Raises:
        ValueError: a stage that is not twice as wide as the one before, or more masks than blocks in the first stage.
    """

    fc_norm: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        base_dims: Sequence[int] = (64,),
        depths: Sequence[int] = (12,),
        num_heads: Sequence[int] = (6,),
        mlp_ratio: float = 4.0,
        num_scales: int = 1,
        masked_blocks: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_chans, img_size, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [width * heads for width, heads in zip(base_dims, num_heads, strict=True)]
        if any(after != 2 * before for before, after in pairwise(dims)):
            raise ValueError(f"stages of widths {dims}: each has to be twice as wide as the one before.")
        if masked_blocks > depths[0]:
            raise ValueError(f"masked_blocks={masked_blocks}: the first stage has {depths[0]} blocks.")
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def block(stage: int, i: int) -> RVTBlock:
            mask_grid = _MASK_GRID if stage == 0 and i < masked_blocks else None
            return RVTBlock(dims[stage], num_heads[stage], mlp_ratio, num_scales, mask_grid, drop_paths[stage][i], **dd)

        self.patch_embed = _PatchEmbed(in_chans, dims[0], **dd)
        self.transformers = nn.ModuleList(_Stage([block(s, i) for i in range(d)]) for s, d in enumerate(depths))
        self.pools = nn.ModuleList(_Pool(dim, **dd) for dim in dims[:-1])
        self._places = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
        self.feature_info = [
            {"num_chs": dims[stage], "reduction": 16 * 2**stage, "module": f"transformers.{stage}.blocks.{block}"}
            for stage, block in self._places
        ]
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self.build_head(dims[-1], num_classes, global_pool, **dd)
        self.apply(self._init_linear)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int] | None) -> None:
        """Records the image size that the model is meant for, and resamples masks that are too small for it.

        Smaller images take the upper left part of the masks, as in the authors' code, so nothing is changed for them.

        Args:
            img_size: `(height, width)` or one number for both, in pixels; None for the size of the pretrained weights.
        """
        super().set_input_size(img_size)
        if img_size is None:
            return
        grid = _PatchEmbed.grid((img_size, img_size) if isinstance(img_size, int) else img_size)
        for module in self.modules():
            if isinstance(module, PositionAwareAttention):
                module.resize_to(grid)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers for layer-wise learning rates: the stem, then each block, poolings with the block before them."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^(?:transformers|pools)\.(\d+)"
            if coarse
            else [
                (r"^transformers\.(\d+)\.\w+\.(\d+)", None),
                (r"^pools\.(\d+)", (99999,)),
                (r"^fc_norm", (99999,)),
            ],
        }

    def stage_blocks(self, index: int) -> nn.Module:
        stage, block = self._places[index]
        return self.transformers.get_submodule(f"{stage}.blocks.{block}")

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        # [B, H, W, C] inside a block; outside of it the same memory seen as [B, C, H, W].
        stage, block = self._places[index]
        if block == 0:
            x = self.pools.get_submodule(str(stage - 1))(x) if stage else self.patch_embed(x)
        run = self.stage_blocks(index)
        x = x.permute(0, 2, 3, 1)
        return (checkpoint(run, x) if self.grad_checkpointing else run(x)).permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to the last block's map, `[B, num_features, H / 16, W / 16]` (tiny: / 32)."""
        return in_parts(super().forward_features, x, _PIXELS_AT_ONCE * self.in_chans, self)

    def keep_stages(self, count: int) -> None:
        stage, block = self._places[count - 1]
        self.transformers = self.transformers[: stage + 1]
        self.transformers[stage] = _Stage(
            list(self.transformers.get_submodule(f"{stage}.blocks").children())[: block + 1]
        )
        self.pools = self.pools[:stage]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits `[B, num_classes]`, or to `[B, head_hidden_size]` with `pre_logits`.

        Without pooling both stay maps: `[B, num_classes, H, W]`, `[B, head_hidden_size, H, W]`.
        """
        x = self.global_pool(x)
        if not self.global_pool.pool_type:
            x = self.head_drop(self.fc_norm(x.permute(0, 2, 3, 1)))
            return (x if pre_logits else self.head(x)).permute(0, 3, 1, 2)
        # A pooling of two kinds gives twice the width: each is normed on its own.
        x = self.head_drop(self.fc_norm(x.unflatten(1, (-1, self.num_features))).flatten(1))
        return x if pre_logits else self.head(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        """Removes what the maps asked for do not need; returns their indices.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: makes no difference, the norm is part of the head.
            prune_head: remove the classifier, the norm before it and the pooling.
        """
        num_stages = self.num_stages
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or self.num_stages < num_stages:
            self.fc_norm = nn.Identity()
        return take


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """The published files' nesting and prefixes taken off, the norm under timm's name, masks as large as the network's.

    A block that has a mask in the file gets one in the network: the authors print more parameters than their code
    builds, and more masks would explain it.

    Args:
        state_dict: the content of a published file (state dict under "model" or bare; perhaps "module." before names),
            or a state dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    state_dict = state_dict.get("model", state_dict)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PositionAwareAttention)}
    grid = next((layer.mask_grid for layer in layers.values() if layer.mask_grid), _MASK_GRID)
    converted = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        name = f"fc_{name}" if name.startswith("norm.") else name
        layer = layers.get(name.removesuffix(".att_mask"))
        if layer is not None and tensor.ndim == 3:
            if layer.mask_grid is None:
                layer.add_mask(grid)
            if tensor.shape[1] < grid[0] * grid[1]:
                tensor = resize_mask(tensor, _MASK_GRID, grid)
        converted[name] = tensor
    return converted


def _cfg(weights_name: str | None = None, **kwargs) -> dict[str, Any]:
    return imagenet_cfg(weights_name, **{"first_conv": "patch_embed.proj.0", "pool_size": (14, 14), **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "tap_rvt_tiny": _cfg(pool_size=(7, 7)),
        "tap_rvt_small": _cfg(),
        "tap_rvt_base": _cfg(),
        "tap_rvt_tiny_plus": _cfg(pool_size=(7, 7)),
        "tap_rvt_small_plus": _cfg(),
        "tap_rvt_base_plus.in1k": _cfg("tap_rvt_base_plus.in1k"),
    }
)


def _create_rvt(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> RVT:
    return weights.build_model(
        RVT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


_TINY = {"base_dims": (32, 32), "depths": (10, 2), "num_heads": (6, 12), "num_scales": 4}
_SMALL = {"base_dims": (64,), "depths": (12,), "num_heads": (6,), "num_scales": 4}
_BASE = {"base_dims": (64,), "depths": (12,), "num_heads": (12,), "num_scales": 4}


@register_model
def tap_rvt_tiny(pretrained: bool = False, **kwargs) -> RVT:
    """RVT-Ti with token-aware pooling: 8.7 M parameters, 1.3 GMACs at 224; `num_scales=1` leaves the pooling out."""
    return _create_rvt("tap_rvt_tiny", pretrained, _TINY, kwargs)


@register_model
def tap_rvt_small(pretrained: bool = False, **kwargs) -> RVT:
    """RVT-S with token-aware pooling: 22.3 M parameters, 4.7 GMACs at 224."""
    return _create_rvt("tap_rvt_small", pretrained, _SMALL, kwargs)


@register_model
def tap_rvt_base(pretrained: bool = False, **kwargs) -> RVT:
    """RVT-B with token-aware pooling: 87.1 M parameters, 17.6 GMACs at 224."""
    return _create_rvt("tap_rvt_base", pretrained, _BASE, kwargs)


@register_model
def tap_rvt_tiny_plus(pretrained: bool = False, **kwargs) -> RVT:
    """RVT-Ti* (masks in the first stage) with token-aware pooling: 11.0 M parameters, 1.3 GMACs at 224."""
    return _create_rvt("tap_rvt_tiny_plus", pretrained, {**_TINY, "masked_blocks": 10}, kwargs)


@register_model
def tap_rvt_small_plus(pretrained: bool = False, **kwargs) -> RVT:
    """RVT-S* (masks in the first five blocks) with token-aware pooling: 23.5 M parameters, 4.7 GMACs at 224."""
    return _create_rvt("tap_rvt_small_plus", pretrained, {**_SMALL, "masked_blocks": 5}, kwargs)


@register_model
def tap_rvt_base_plus(pretrained: bool = False, **kwargs) -> RVT:
    """RVT-B* with token-aware pooling: 89.4 M parameters, 17.6 GMACs at 224, 83.1 % top-1 as published."""
    return _create_rvt("tap_rvt_base_plus", pretrained, {**_BASE, "masked_blocks": 5}, kwargs)
