"""LITv2: high and low frequencies of a map get their own attention heads (HiLo).

Paper: "Fast Vision Transformers with HiLo Attention", Pan et al., NeurIPS 2022, https://arxiv.org/abs/2205.13213.
The authors' code (Apache-2.0): https://github.com/ziplab/LITv2.

Written from the paper and checked against outputs of the authors' models. What differs from their code:

* any image size: square or not, padded as in the authors' dense-prediction setting;
* runs everywhere: the deformable merging layer needs no compiled operator (`deform_patches`);
* the maps stay `[B, H, W, C]` throughout, so that nothing is copied between convolutions and linear layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

import weights
from vision.attention import AttentionTap, attend
from vision.inference import gelu
from vision.pyramid import PyramidBackbone, imagenet_cfg, pad_bottom_right

__all__ = ["DeformableTokenMerging", "HiLo", "LITv2", "LITv2Block", "checkpoint_filter_fn", "deform_patches"]


@register_notrace_module
class HiLo(nn.Module):
    """HiLo attention: windows for high frequencies (Hi-Fi), pooled keys for low ones (Lo-Fi).

    Of the `num_heads` heads, `int(num_heads * alpha)` are Lo-Fi: every token attends to the averages of the
    `window_size` × `window_size` windows (eq. 3 of the paper); the others are Hi-Fi: every token attends to its own
    window. The channels of Hi-Fi come first. With `window_size` 1 all heads are Lo-Fi, which then is plain attention.
    Names in the state dict are the authors'.

    Args:
        dim: width C.
        num_heads: heads of both kinds together.
        qkv_bias: bias on queries, keys and values (all released models have it).
        qk_scale: factor on the scores; by default `head_dim ** -0.5`.
        window_size: side of a window (s in the paper).
        alpha: share of Lo-Fi heads.

    Raises:
        ValueError: `dim` does not divide by `num_heads`, or `alpha` is not in [0, 1].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        window_size: int = 2,
        alpha: float = 0.5,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide by num_heads={num_heads}.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is a share of heads; expected a number from 0 to 1.")
        head_dim = dim // num_heads
        self.dim = dim
        self.window_size = window_size
        self.scale = qk_scale or head_dim**-0.5
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.l_dim = self.l_heads * head_dim
        self.h_dim = self.h_heads * head_dim
        if self.l_heads:
            self.l_q = nn.Linear(dim, self.l_dim, bias=qkv_bias, **dd)
            self.l_kv = nn.Linear(dim, 2 * self.l_dim, bias=qkv_bias, **dd)
            self.l_proj = nn.Linear(self.l_dim, self.l_dim, **dd)
            self.l_tap = AttentionTap()
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.h_dim, bias=qkv_bias, **dd)
            self.h_proj = nn.Linear(self.h_dim, self.h_dim, **dd)

    def hi_fi(self, x: Tensor) -> Tensor:
        """Attention inside windows: `[B, H, W, C]`, H and W multiples of the window, → `[B, H, W, h_dim]`."""
        B, H, W, _ = x.shape
        s = self.window_size
        qkv = self.h_qkv(x).reshape(B, H // s, s, W // s, s, 3, self.h_heads, -1)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, self.h_heads, s * s, self.h_dim // self.h_heads)
        q, k, v = qkv  # [B * windows, heads, s * s, d] each
        x = attend(q, k, v, self.scale).reshape(B, H // s, W // s, self.h_heads, s, s, -1)
        return self.h_proj(x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, self.h_dim))

    def lo_fi(self, x: Tensor, extent: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Attention to the windows' averages: `[B, H, W, C]`, as `hi_fi`, → `[B, H, W, l_dim]`."""
        B, H, W, _ = x.shape
        s = self.window_size
        q = self.l_q(x).reshape(B, H * W, self.l_heads, -1).transpose(1, 2)  # [B, heads, N, d]
        if s > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), s).permute(0, 2, 3, 1)
        grid = x.shape[1], x.shape[2]
        k, v = self.l_kv(x).reshape(B, -1, 2, self.l_heads, self.l_dim // self.l_heads).permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, self.scale, tap=self.l_tap, key_grid=grid, extent=extent)
        return self.l_proj(x.transpose(1, 2).reshape(B, H, W, self.l_dim))

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
        """Attention over a map.

        Args:
            x: `[B, H, W, C]`, or `[B, N, C]` with N = H * W tokens, row by row.
            H: height of the map, for `[B, N, C]`; without H and W the map is square.
            W: width of the map, for `[B, N, C]`.

        Returns:
            The same shape. Maps that do not divide by the window are padded on the right and on the bottom with
            zeros; padded tokens are keys in their window and count in its average.

        Raises:
            ValueError: H and W do not multiply to N, or are not given and the map is not square.
        """
        if x.ndim == 3:
            B, N, C = x.shape
            height = H or (N // W if W else math.isqrt(N))
            width = W or (N // H if H else height)
            if height * width != N:
                raise ValueError(f"{N} tokens are not a map of H={height} by W={width}; pass the map's H and W.")
            return self(x.reshape(B, height, width, C)).reshape(B, N, C)
        H, W = x.shape[1:3]
        # Without Hi-Fi nothing needs whole windows' tokens, but the averages are over padded windows all the same.
        x = pad_bottom_right(x, (self.window_size, self.window_size))
        parts = [self.hi_fi(x)] if self.h_heads else []
        if self.l_heads:
            parts.append(self.lo_fi(x, (x.shape[1] / H, x.shape[2] / W)))
        x = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return x[:, :H, :W]


def deform_patches(x: Tensor, offset: Tensor) -> Tensor:
    """Samples the four pixels of every 2x2 patch, each moved by an offset of its own (bilinear, 0 outside the map).

    Args:
        x: `[B, H, W, C]`.
        offset: `[B, H // 2, W // 2, 4, 2]`, (dy, dx) in pixels of x for the patch's pixels, row by row.

    Returns:
        `[B, H // 2, W // 2, 4, C]`; for offsets 0 the patches as they are. Differentiable in both.
    """
    B, H, W, C = x.shape
    h, w = offset.shape[1:3]
    # A position in half precision is off by up to half a pixel on a large map.
    offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
    rows = 2 * torch.arange(h, device=x.device).view(h, 1, 1) + torch.tensor([0, 0, 1, 1], device=x.device)
    cols = 2 * torch.arange(w, device=x.device).view(1, w, 1) + torch.tensor([0, 1, 0, 1], device=x.device)
    y, z = offset[..., 0] + rows, offset[..., 1] + cols  # [B, h, w, 4]
    y0, z0 = y.floor(), z.floor()
    fy, fz = y - y0, z - z0
    corner_y = torch.stack((y0, y0, y0 + 1, y0 + 1), dim=-1)  # [B, h, w, 4, 4 corners]
    corner_z = torch.stack((z0, z0 + 1, z0, z0 + 1), dim=-1)
    weight = torch.stack(((1 - fy) * (1 - fz), (1 - fy) * fz, fy * (1 - fz), fy * fz), dim=-1)
    inside = (corner_y >= 0) & (corner_y < H) & (corner_z >= 0) & (corner_z < W)
    weight = (weight * inside).to(x.dtype)
    index = corner_y.clamp(0, H - 1).long() * W + corner_z.clamp(0, W - 1).long()
    index = index + H * W * torch.arange(B, device=x.device).view(B, 1, 1, 1, 1)
    table = x.reshape(B * H * W, C)
    if torch.compiler.is_compiling():
        patches = (table[index] * weight.unsqueeze(-1)).sum(-2)
    else:  # a bag of four weighted rows: the one kernel that does not write the corners out first
        patches = F.embedding_bag(index.view(-1, 4), table, mode="sum", per_sample_weights=weight.view(-1, 4))
    return patches.view(B, h, w, 4, C)


class _DeformableConv(nn.Module):
    """2x2 convolution with stride 2 at moved positions; offset and convolution under the authors' names."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_dim, dim, 2, 2, **dd))
        self.bias = nn.Parameter(torch.empty(out_dim, **dd))
        self.conv_offset = nn.Conv2d(dim, 8, 2, 2, **dd)
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -0.5 * dim**-0.5, 0.5 * dim**-0.5)  # fan-in is 4 * dim
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H // 2, W // 2, out_dim]."""
        offset = self.conv_offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, h, w, 8]
        patches = deform_patches(x, offset.unflatten(-1, (4, 2)))
        return F.linear(patches.flatten(-2), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


@register_notrace_module
class DeformableTokenMerging(nn.Module):
    """Halves the map and doubles the width by a deformable 2x2 convolution, BatchNorm and GELU (section 3.3).

    The convolution is of the first kind (offsets, no modulation); its offsets start at 0, where it is a plain
    convolution. An odd last row or column makes no output, but offsets may reach it.

    Args:
        dim: width C.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dconv = _DeformableConv(dim, 2 * dim, **dd)
        self.norm_layer = nn.BatchNorm2d(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H // 2, W // 2, 2 * C]."""
        x = self.norm_layer(self.dconv(x).permute(0, 3, 1, 2))
        return F.gelu(x).permute(0, 2, 3, 1)


class _DepthwiseConv(nn.Module):
    """3x3 depthwise convolution on `[B, H, W, C]`; its zero padding is what tells position."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(self.dwconv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _ConvMlp(nn.Module):
    """linear, depthwise convolution, GELU, linear, on `[B, H, W, C]`."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = _DepthwiseConv(hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.dwconv(self.fc1(x))))


class LITv2Block(nn.Module):
    """Pre-norm attention (stages 3 and 4 only) and convolutional MLP on `[B, H, W, C]`, with shortcuts and drop path.

    Args:
        dim: width C.
        attn: the attention on `[B, H, W, C]`, or None.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module | None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd) if attn else None
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = _ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class _PatchEmbed(nn.Module):
    """Image to `[B, ceil(H / 4), ceil(W / 4), C]`: padded to whole patches, 4x4 convolution, LayerNorm."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, dim, 4, 4, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_bottom_right(x.permute(0, 2, 3, 1).contiguous(), (4, 4))
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class _Stage(nn.Module):
    """The blocks at one stride, and the merging layer after them (none in the last stage)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class LITv2(PyramidBackbone):
    """LITv2: convolutional MLPs alone in the first two stages, HiLo attention in the last two.

    Takes any image size: padded to a multiple of 4; at each merging layer maps round down.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for none.
        global_pool: a pooling of timm's `SelectAdaptivePool2d`; '' keeps the map.
        img_size: recorded for preprocessing; no weight depends on it.
        embed_dim: width of the first stage; doubles at each further one.
        depths: blocks per stage.
        num_heads: heads per stage; those of stages without attention are not used.
        mlp_ratio: hidden width of the MLPs over the stage's width.
        qkv_bias: bias on queries, keys and values.
        alpha: share of Lo-Fi heads.
        window_sizes: per stage the side of a HiLo window; 0 for no attention.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        alpha: float = 0.9,
        window_sizes: Sequence[int] = (0, 0, 2, 1),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_chans, img_size, drop_rate)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * 2**i for i in range(len(depths))]
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def block(stage: int, drop_path: float) -> LITv2Block:
            dim, window = dims[stage], window_sizes[stage]
            attn = HiLo(dim, num_heads[stage], qkv_bias, None, window, alpha, **dd) if window else None
            return LITv2Block(dim, attn, mlp_ratio, drop_path, **dd)

        self.patch_embed = _PatchEmbed(in_chans, embed_dim, **dd)
        self.layers = nn.ModuleList(
            _Stage(
                [block(i, rate) for rate in drop_paths[i]],
                DeformableTokenMerging(dim, **dd) if i < len(dims) - 1 else nn.Identity(),
            )
            for i, dim in enumerate(dims)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"} for i, dim in enumerate(dims)
        ]
        self.norm = LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.build_head(dims[-1], num_classes, global_pool, **dd)
        self.apply(self._init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers for layer-wise learning rates: the stem, then each block, merging layers with the one before."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^layers\.(\d+)"
            if coarse
            else [
                (r"^layers\.(\d+)\.downsample", (99999,)),
                (r"^layers\.(\d+)\.\w+\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def stage_blocks(self, index: int) -> nn.Module:
        return self.layers.get_submodule(f"{index}.blocks")

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        # [B, H, W, C] inside a stage; outside of it the same memory seen as [B, C, H, W].
        if index == 0:
            x = self.patch_embed(x)
        else:
            x = self.layers.get_submodule(f"{index - 1}.downsample")(x.permute(0, 2, 3, 1))
        return self.run_blocks(index, x).permute(0, 3, 1, 2)

    def keep_stages(self, count: int) -> None:
        self.layers = self.layers[:count]
        self.layers[-1].downsample = nn.Identity()


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """The published files' nesting and prefixes taken off; the names are the authors' already.

    Args:
        state_dict: the content of a published file (state dict under "model" or "state_dict", or bare; "module."
            before names of the dense-prediction files), or a state dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def _cfg(weights_name: str | None = None, **kwargs) -> dict[str, Any]:
    return imagenet_cfg(weights_name, first_conv="patch_embed.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "litv2_nano": _cfg(),
        "litv2_small.in1k": _cfg("litv2_small.in1k"),
        # the authors' study of head splits: each is built with the alpha that it was trained with
        **{entry.name: _cfg(entry.name) for entry in weights.entries("litv2_small.alpha*")},
        "litv2_medium.in1k": _cfg("litv2_medium.in1k"),
        "litv2_base.in1k": _cfg("litv2_base.in1k"),
        "litv2_base_384.in1k": _cfg(
            "litv2_base_384.in1k", input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash"
        ),
    }
)


def _create_litv2(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> LITv2:
    return weights.build_model(
        LITv2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def litv2_nano(pretrained: bool = False, **kwargs) -> LITv2:
    """1.7 M parameters, for tests, teaching and small data; not in the paper."""
    defaults = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    return _create_litv2("litv2_nano", pretrained, defaults, kwargs)


@register_model
def litv2_small(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-S: 27.8 M parameters, 3.7 GMACs at 224, 82.0 % top-1 as published."""
    return _create_litv2("litv2_small", pretrained, {}, kwargs)


@register_model
def litv2_medium(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-M: 48.8 M parameters, 7.5 GMACs at 224, 83.3 % top-1 as published."""
    return _create_litv2("litv2_medium", pretrained, {"depths": (2, 2, 18, 2)}, kwargs)


_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


@register_model
def litv2_base(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-B: 86.5 M parameters, 13.2 GMACs at 224, 83.6 % top-1 as published."""
    return _create_litv2("litv2_base", pretrained, _BASE, kwargs)


@register_model
def litv2_base_384(pretrained: bool = False, **kwargs) -> LITv2:
    """LITv2-B fine-tuned at 384: 39.7 GMACs, 84.7 % top-1 as published."""
    return _create_litv2("litv2_base_384", pretrained, _BASE, kwargs)
