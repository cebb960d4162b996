"""BiFormer: every region of a map attends to the few regions that suit it best.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", Zhu et al., CVPR 2023,
https://arxiv.org/abs/2303.08810. The authors' code (MIT): https://github.com/rayleizhu/BiFormer.

Written from the paper and checked against outputs of the authors' models. What differs from their code:

* any image size: maps that do not divide by the regions are padded, as in the authors' dense-prediction setting;
* routed attention gathers the chosen keys, or masks a dense attention where the map is so small that this is faster
  (`routed_attention`); both give the same numbers;
* the maps stay in channels-last memory, so that nothing is copied between convolutions and attention;
* options that no released model uses are left out: downsampled keys, soft or learned routing, LayerScale, post-norm.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_ntuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

import weights
from vision.attention import AttentionTap, attend
from vision.inference import is_eager_cpu_inference
from vision.pyramid import PyramidBackbone, imagenet_cfg, pad_bottom_right

__all__ = [
    "AttentionLePE",
    "BiFormer",
    "BiFormerBlock",
    "BiLevelRoutingAttention",
    "BiLevelRoutingAttentionNCHW",
    "checkpoint_filter_fn",
    "routed_attention",
    "top_regions",
]


def top_regions(q: Tensor, k: Tensor, topk: int) -> Tensor:
    """The regions whose mean key fits a region's mean query best (eq. 3 and 4 of the paper).

    Args:
        q: mean queries of the regions, `[B, R, C]`, all heads together.
        k: mean keys of the regions, `[B, R, C]`.
        topk: how many regions to keep (k in eq. 4); never more than there are.

    Returns:
        Indices `[B, R, topk]` in `0 … R - 1`, in no particular order. A region need not choose itself.
    """
    scores = q @ k.transpose(-1, -2)  # [B, R, R]
    return scores.topk(min(topk, scores.shape[-1]), dim=-1, sorted=False).indices


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    size: tuple[int, int],
    num_heads: int,
    scale: float,
    mode: Literal["auto", "gather", "mask"] = "auto",
    tap: AttentionTap | None = None,
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Every token attends to all tokens of the regions that its own region chose (eq. 5 and 6 of the paper).

    Args:
        q: queries, `[B, H, W, Cqk]`; H and W are multiples of the region size.
        k: keys, `[B, H, W, Cqk]`.
        v: values, `[B, H, W, C]`.
        index: the regions that each region chose, `[B, R, topk]`, the same for all heads; regions run row by row.
        size: height and width of a region in tokens.
        num_heads: heads are consecutive blocks of channels.
        scale: factor on the scores before the softmax.
        mode: 'gather' copies the chosen keys and values to each region, O(N * topk * h * w) time and memory for N
            tokens; 'mask' computes all N * N scores and masks the others, which copies nothing; 'auto' takes what is
            faster at this size.
        tap: if open, gets the attention over all N tokens (by way of 'mask', whatever the mode).
        extent: height and width of the map in units of what it was before padding, for the tap.

    Returns:
        `[B, H, W, C]`. The gradient flows through the attention, not through the choice.
    """
    B, H, W, C = v.shape
    grid = H // size[0], W // size[1]
    num_chosen = index.shape[-1] * size[0] * size[1]
    if mode == "auto" and v.device.type != "meta":  # where nothing runs, what is counted should be the method's own
        mode = "mask" if _prefers_mask(H * W, num_chosen) else "gather"
    if mode == "mask" or (tap is not None and tap.is_open):
        q, k, v = (t.reshape(B, H * W, num_heads, -1).transpose(1, 2) for t in (q, k, v))  # [B, heads, N, d]
        mask = _region_mask(index, grid, size, q.dtype)
        return attend(q, k, v, scale, mask, tap, (H, W), extent).transpose(1, 2).reshape(B, H, W, C)

    q, k, v = (_to_regions(t, size, num_heads) for t in (q, k, v))  # [B, R, heads, n, d]
    k, v = _gather_regions(k, index), _gather_regions(v, index)  # [B * R * heads, topk * n, d]
    attn = ((q * scale).flatten(0, 2) @ k.transpose(1, 2)).softmax(-1)  # [B * R * heads, n, topk * n]
    x = (attn @ v).reshape(B, *grid, num_heads, *size, C // num_heads)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C)


def _prefers_mask(num_tokens: int, num_chosen: int) -> bool:
    """Whether masking all keys beats gathering the chosen ones (measured by `benchmarks/routing.py`)."""
    return num_tokens <= 1600 and 4 * num_chosen >= num_tokens


def _region_mask(index: Tensor, grid: tuple[int, int], size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The choice `[B, R, topk]` as an additive mask `[B, 1, N, N]`: 0 for keys of a chosen region, -inf for others."""
    B, R, _ = index.shape
    mask = torch.full((B, R, R), float("-inf"), dtype=dtype, device=index.device).scatter(-1, index, 0.0)
    region = torch.arange(R, device=index.device).reshape(grid)
    region = region.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1).flatten()  # [N], a token's region
    return mask.index_select(1, region).index_select(2, region).unsqueeze(1)


def _to_regions(x: Tensor, size: tuple[int, int], num_heads: int) -> Tensor:
    """[B, H, W, C] → [B, R, heads, n, d]: regions, and the n tokens in each, row by row."""
    B, H, W, C = x.shape
    h, w = size
    x = x.reshape(B, H // h, h, W // w, w, num_heads, C // num_heads).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B, (H // h) * (W // w), num_heads, h * w, C // num_heads)


def _gather_regions(x: Tensor, index: Tensor) -> Tensor:
    """[B, R, heads, n, d] and [B, R, topk] → [B * R * heads, topk * n, d], the chosen regions one after another."""
    B, R, heads, n, d = x.shape
    batch = torch.arange(B, device=index.device).view(B, 1, 1, 1)
    head = torch.arange(heads, device=index.device).view(1, 1, heads, 1)
    rows = (batch * R + index.unsqueeze(2)) * heads + head  # [B, R, heads, topk]
    return x.reshape(-1, n * d).index_select(0, rows.flatten()).view(B * R * heads, -1, d)


def _depthwise(dim: int, kernel_size: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **dd)


def _conv_nhwc(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution on `[B, H, W, C]`, which is a channels-last map already: no copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _check_width(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"width {dim} does not divide by num_heads={num_heads}.")


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention on `[B, H, W, C]`: n_win × n_win regions, whatever the size of the map.

    For a region r of the map, with Q_r and K_r the means of its queries and keys:
    `I(r) = topk_j(Q_r · K_j)`, `out = softmax(s * q [k_I(r)]ᵀ) [v_I(r)] + lepe(v)`, then a linear layer (eq. 1 to 7).
    Names in the state dict are the authors'.

    Args:
        dim: width C.
        num_heads: attention heads; the routing is common to them.
        n_win: regions per side (S in the paper).
        qk_dim: width of queries and keys; `dim` by default.
        qk_scale: factor s; by default `qk_dim ** -0.5`: of the whole width, not of a head's, as the released
            weights expect.
        topk: regions that a region attends to (k in eq. 4).
        side_dwconv: kernel of the depthwise convolution on v (`lepe`); 0 for none.
        auto_pad: pad the input on the right and on the bottom where it does not divide by `n_win`. Padded tokens are
            keys and values too, as in the authors' dense-prediction setting.

    Raises:
        ValueError: `qk_dim` or `dim` does not divide by `num_heads`; in `forward` with `auto_pad=False`, H or W does
            not divide by `n_win`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.n_win = n_win
        self.qk_dim = qk_dim or dim
        _check_width(dim, num_heads)
        _check_width(self.qk_dim, num_heads)
        self.scale = qk_scale or self.qk_dim**-0.5
        self.topk = topk
        self.auto_pad = auto_pad
        self.qkv = nn.Sequential(OrderedDict(qkv=nn.Linear(dim, 2 * self.qk_dim + dim, **dd)))
        self.lepe = _depthwise(dim, side_dwconv, **dd) if side_dwconv else None
        self.wo = nn.Linear(dim, dim, **dd)
        self.tap = AttentionTap()

    def route(self, qkv: Tensor) -> Tensor:
        """The regions that each region attends to.

        Args:
            qkv: queries, keys and values side by side, `[B, H, W, 2 * qk_dim + C]`; H and W are multiples of `n_win`.

        Returns:
            Indices, `[B, n_win ** 2, topk]`.
        """
        size = qkv.shape[1] // self.n_win, qkv.shape[2] // self.n_win
        means = F.avg_pool2d(qkv.detach().permute(0, 3, 1, 2), size).flatten(2).mT  # [B, R, 2 * qk_dim + C]
        q, k, _ = means.split((self.qk_dim, self.qk_dim, self.dim), dim=-1)
        return top_regions(q, k, self.topk)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        H, W = x.shape[1:3]
        S = self.n_win
        if not self.auto_pad and (H % S or W % S):
            raise ValueError(f"a {H}x{W} map does not divide into n_win={S} regions per side; pass auto_pad=True.")
        qkv = self.qkv(pad_bottom_right(x, (S, S)))
        size = qkv.shape[1] // S, qkv.shape[2] // S
        q, k, v = qkv.split((self.qk_dim, self.qk_dim, self.dim), dim=-1)
        extent = qkv.shape[1] / H, qkv.shape[2] / W
        x = routed_attention(q, k, v, self.route(qkv), size, self.num_heads, self.scale, tap=self.tap, extent=extent)
        if self.lepe is not None:
            x = x + _conv_nhwc(self.lepe, v)
        return self.wo(x[:, :H, :W])


@register_notrace_module
class BiLevelRoutingAttentionNCHW(nn.Module):
    """The authors' second form of bi-level routing attention, on `[B, C, H, W]`.

    The same as `BiLevelRoutingAttention` where the map divides by `n_win`. Where it does not, this form makes
    `ceil(H / h) * ceil(W / w)` regions of `(h, w) = (H // n_win, W // n_win)` tokens (at least one), and pads with
    zeros *after* the projection: padded keys have score 0 and value 0, and are left out of the regions' means.

    Args:
        dim: width C.
        num_heads: attention heads.
        n_win: regions per side, when the map divides.
        qk_scale: factor on the scores; by default `dim ** -0.5`.
        topk: regions that a region attends to; at most as many as there are.
        side_dwconv: kernel of the depthwise convolution on v; 0 for none.

    Raises:
        ValueError: `dim` does not divide by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_width(dim, num_heads)
        self.num_heads = num_heads
        self.n_win = n_win
        self.scale = qk_scale or dim**-0.5
        self.topk = topk
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.lepe = _depthwise(dim, side_dwconv, **dd) if side_dwconv else None
        self.output_linear = nn.Conv2d(dim, dim, 1, **dd)
        self.tap = AttentionTap()

    def route(self, qkv: Tensor, size: tuple[int, int]) -> Tensor:
        """The regions, of `size`, that each region of `qkv`, `[B, 3 * C, H, W]`, attends to: indices `[B, R, topk]`."""
        means = F.avg_pool2d(qkv.detach(), size, ceil_mode=True, count_include_pad=False)
        q, k, _ = means.flatten(2).mT.chunk(3, dim=-1)  # [B, R, C] each
        return top_regions(q, k, self.topk)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        C, H, W = x.shape[1:]
        size = max(H // self.n_win, 1), max(W // self.n_win, 1)
        qkv = self.qkv_linear(x)
        index = self.route(qkv, size)
        qkv = qkv.permute(0, 2, 3, 1)  # [B, H, W, 3 * C]
        q, k, v = pad_bottom_right(qkv, size).split(C, dim=-1)
        extent = v.shape[1] / H, v.shape[2] / W
        x = routed_attention(q, k, v, index, size, self.num_heads, self.scale, tap=self.tap, extent=extent)[:, :H, :W]
        if self.lepe is not None:
            x = x + _conv_nhwc(self.lepe, qkv[..., -C:])
        return self.output_linear(x.permute(0, 3, 1, 2))


@register_notrace_module
class AttentionLePE(nn.Module):
    """Full attention on `[B, H, W, C]` with a depthwise convolution as locally-enhanced position encoding.

    `linear(softmax(s * q kᵀ) v + lepe(input or v))`; no bias on q, k and v. Names in the state dict are the authors'.

    Args:
        dim: width C.
        num_heads: attention heads; s is `(dim / num_heads) ** -0.5`.
        side_dwconv: kernel of the convolution; 0 for none.
        lepe_on: what the convolution is applied to: the layer's input 'x', or the values 'v'.

    Raises:
        ValueError: `dim` does not divide by `num_heads`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        side_dwconv: int = 5,
        lepe_on: Literal["x", "v"] = "x",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_width(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.lepe_on = lepe_on
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = _depthwise(dim, side_dwconv, **dd) if side_dwconv else None
        self.tap = AttentionTap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] → [B, H, W, C]."""
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        q, k, v = qkv.reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        out = attend(q, k, v, self.scale, tap=self.tap, key_grid=(H, W)).transpose(1, 2).reshape(B, H, W, C)
        if self.lepe is not None:
            out = out + _conv_nhwc(self.lepe, x if self.lepe_on == "x" else qkv[..., -C:])
        return self.proj(out)


class BiFormerBlock(nn.Module):
    """`x + pos_embed(x)`, then attention and MLP, each with pre-norm, a shortcut and drop path.

    Args:
        dim: width C.
        attn: the attention, on `[B, H, W, C]`, or on `[B, C, H, W]` if it is a `BiLevelRoutingAttentionNCHW`.
        mlp_ratio: hidden width of the MLP over C.
        pos_dwconv: kernel of the depthwise convolution that carries position; 0 for none.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 3.0,
        pos_dwconv: int = 3,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = _depthwise(dim, pos_dwconv, **dd) if pos_dwconv else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.channels_first = isinstance(attn, BiLevelRoutingAttentionNCHW)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], both in channels-last memory."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        y = self.norm1(x)
        y = _conv_nhwc(self.attn, y) if self.channels_first else self.attn(y)
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(PyramidBackbone):
    """BiFormer and its Swin-Tiny-layout relatives: four stages, routed attention in the first, full in the last.

    Takes any image size; stage maps round up (layout 'biformer') or down ('stl', 'stl_nchw') at each downsampling.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for none.
        global_pool: a pooling of timm's `SelectAdaptivePool2d`; '' keeps the map.
        img_size: recorded for preprocessing; no weight depends on it.
        depths: blocks per stage.
        embed_dims: width per stage.
        mlp_ratios: hidden width of the MLPs over the stage's width.
        head_dim: width of a head in routed attention.
        full_heads: heads of full attention.
        n_win: regions per side.
        topks: per stage the number of regions to attend to; -1 for full attention without, -2 with `lepe`.
        side_dwconv: kernel of `lepe`.
        layout: 'biformer': overlapping stem and downsampling, a positional convolution in each block; 'stl': those of
            Swin, no positional convolution; 'stl_nchw': 'stl' with the authors' second form of the attention.
        auto_pad: pad maps that do not divide by `n_win`; if False they raise (not in 'stl_nchw', which always pads).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Raises:
        ValueError: unknown `layout` or `topks`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        mlp_ratios: float | Sequence[float] = 3.0,
        head_dim: int = 32,
        full_heads: int = 8,
        n_win: int | Sequence[int] = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        side_dwconv: int = 5,
        layout: Literal["biformer", "stl", "stl_nchw"] = "biformer",
        auto_pad: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_chans, img_size, drop_rate)
        if layout not in ("biformer", "stl", "stl_nchw"):
            raise ValueError(f"layout={layout!r}: expected 'biformer', 'stl' or 'stl_nchw'.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        num_stages = len(depths)
        n_wins: Any = to_ntuple(num_stages)(n_win)
        ratios: Any = to_ntuple(num_stages)(mlp_ratios)
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = (in_chans, *embed_dims)

        def attention(stage: int) -> nn.Module:
            dim, topk = embed_dims[stage], topks[stage]
            if topk > 0:
                cls = BiLevelRoutingAttentionNCHW if layout == "stl_nchw" else BiLevelRoutingAttention
                pad = {} if layout == "stl_nchw" else {"auto_pad": auto_pad}
                return cls(dim, dim // head_dim, n_wins[stage], topk=topk, side_dwconv=side_dwconv, **pad, **dd)
            if topk not in (-1, -2):
                raise ValueError(f"topks={tuple(topks)}: expected numbers of regions, -1 or -2.")
            lepe_on = "v" if layout == "stl_nchw" else "x"
            return AttentionLePE(dim, full_heads, side_dwconv if topk == -2 else 0, lepe_on, **dd)

        pos_dwconv = 3 if layout == "biformer" else 0
        downsample = _overlapping_downsample if layout == "biformer" else _patch_downsample
        self.downsample_layers = nn.ModuleList(downsample(i, dims[i], dims[i + 1], **dd) for i in range(num_stages))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    BiFormerBlock(embed_dims[i], attention(i), ratios[i], pos_dwconv, rate, **dd)
                    for rate in drop_paths[i]
                )
            )
            for i in range(num_stages)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(embed_dims)
        ]
        self.norm = nn.BatchNorm2d(embed_dims[-1], **dd)
        self.build_head(embed_dims[-1], num_classes, global_pool, **dd)
        self.apply(self._init_linear)

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Layers for layer-wise learning rates: the stem, then each block with the downsampling before its stage."""
        return {
            "stem": r"^downsample_layers\.0",
            "blocks": r"^(?:stages|downsample_layers)\.(\d+)"
            if coarse
            else [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))],
        }

    def stage_blocks(self, index: int) -> nn.Module:
        return self.stages[index]

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        if index == 0:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.run_blocks(index, self.downsample_layers[index](x))

    def keep_stages(self, count: int) -> None:
        self.downsample_layers = self.downsample_layers[:count]
        self.stages = self.stages[:count]


@register_notrace_module  # so that a traced graph takes the same way, bit for bit
class _DownsampleConv(nn.Conv2d):
    """3x3 convolution with stride 2; on a CPU as a product of patches where its weights are many and the map is small.

    The convolution kernel brings the weights into an order of its own at each call. On the 14x14 map before the last
    stage that takes far longer than the arithmetic; patches cost next to nothing there.
    """

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if is_eager_cpu_inference(x) and self.weight.numel() > 4 * x.numel():
            patches = F.unfold(x, 3, padding=1, stride=2).mT  # [B, H / 2 * W / 2, 9 * C]
            y = F.linear(patches, self.weight.flatten(1), self.bias).mT  # [B, out_dim, H / 2 * W / 2]
            return y.unflatten(2, (-(-x.shape[2] // 2), -1))
        return super().forward(x)


def _overlapping_downsample(stage: int, dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    """The stem (stage 0, stride 4) or the step between two stages (stride 2), by 3x3 convolutions."""
    if stage:
        return nn.Sequential(_DownsampleConv(dim, out_dim, **dd), nn.BatchNorm2d(out_dim, **dd))
    return nn.Sequential(
        nn.Conv2d(dim, out_dim // 2, 3, 2, 1, **dd),
        nn.BatchNorm2d(out_dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(out_dim // 2, out_dim, 3, 2, 1, **dd),
        nn.BatchNorm2d(out_dim, **dd),
    )


def _patch_downsample(stage: int, dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
    """The stem (stage 0, stride 4) or the step between two stages (stride 2), by patches that do not overlap."""
    if stage:
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out_dim, 2, 2, **dd))
    return nn.Sequential(nn.Conv2d(dim, out_dim, 4, 4, **dd), nn.BatchNorm2d(out_dim, **dd))


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """The authors' names to ours; a state dict of ours passes through.

    Args:
        state_dict: the published file's content, with or without the nesting under "model", or a state dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    state_dict = state_dict.get("model", state_dict)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    renamed = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^(stages\.\d+)\.blocks\.", r"\1.", name)
        name = re.sub(r"\.mlp\.(\d)\.", lambda m: ".mlp.fc1." if m[1] == "0" else ".mlp.fc2.", name)
        if tensor.ndim == 4 and len(shapes.get(name, ())) == 2:
            tensor = tensor.flatten(1)  # a 1x1 convolution is a linear layer
        renamed[name] = tensor
    return renamed


def _cfg(weights_name: str | None = None, **kwargs) -> dict[str, Any]:
    return imagenet_cfg(weights_name, first_conv="downsample_layers.0.0", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "biformer_nano": _cfg(),
        "biformer_tiny.in1k": _cfg("biformer_tiny.in1k"),
        "biformer_small.in1k": _cfg("biformer_small.in1k"),
        "biformer_base.in1k": _cfg("biformer_base.in1k"),
        "biformer_stl.in1k": _cfg("biformer_stl.in1k"),
        "biformer_stl_nchw.in1k": _cfg("biformer_stl_nchw.in1k"),
    }
)


def _create_biformer(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> BiFormer:
    return weights.build_model(
        BiFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def biformer_nano(pretrained: bool = False, **kwargs) -> BiFormer:
    """1.7 M parameters, for tests, teaching and small data; not in the paper."""
    defaults = {"depths": (1, 1, 2, 1), "embed_dims": (32, 64, 128, 256)}
    return _create_biformer("biformer_nano", pretrained, defaults, kwargs)


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-T: 13.1 M parameters, 2.2 GMACs at 224, 81.4 % top-1 as published."""
    return _create_biformer("biformer_tiny", pretrained, {}, kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-S: 25.5 M parameters, 4.5 GMACs at 224, 83.8 % top-1 as published."""
    return _create_biformer("biformer_small", pretrained, {"depths": (4, 4, 18, 4)}, kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer-B: 56.8 M parameters, 9.8 GMACs at 224, 84.3 % top-1 as published."""
    defaults = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)}
    return _create_biformer("biformer_base", pretrained, defaults, kwargs)


_STL = {"depths": (2, 2, 6, 2), "embed_dims": (96, 192, 384, 768), "mlp_ratios": 4.0}


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    """BiFormer attention in Swin-T's layout: 28.4 M parameters, 4.6 GMACs at 224, 82.7 % top-1 as published."""
    return _create_biformer("biformer_stl", pretrained, {**_STL, "layout": "stl"}, kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    """`biformer_stl` with the authors' second form of the attention; the same figures as published."""
    return _create_biformer("biformer_stl_nchw", pretrained, {**_STL, "layout": "stl_nchw"}, kwargs)
