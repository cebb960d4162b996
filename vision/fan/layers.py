"""The layers of FAN: token mixing, channel processing, their block, and the convolutional stages of the hybrids."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import register_notrace_module
from timm.models.convnext import ConvNeXtBlock
from timm.models.xcit import LPI
from torch import Tensor, nn

from vision.attention import AttentionTap, attend
from vision.inference import batch_norm, gelu, in_parts, is_eager_cpu_inference
from vision.tap import TokenAwareAveragePooling

__all__ = ["ChannelProcessing", "FANBlock", "HybridEmbed", "LayerNorm2dUnbiased", "TokenMixing"]


class TokenMixing(nn.Module):
    """Multi-head self-attention over tokens; q apart from k and v, as the authors name them.

    Args:
        dim: width C.
        num_heads: heads.
        qkv_bias: bias on queries, keys and values (all published networks have it).

    Raises:
        ValueError: `dim` does not divide by `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} does not divide by num_heads={num_heads}.")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.tap = AttentionTap()

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`; the N = H * W tokens are a map, row by row."""
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)  # [B, h, N, d]
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(q, k, v, self.scale, tap=self.tap, key_grid=(H, W))
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


@register_notrace_module  # a trace would take the path of training, which rounds differently
class _LocalMlp(nn.Module):
    """linear, two depthwise convolutions beside a shortcut, linear, on `[B, N, C]`; the convolutions are XCiT's."""

    def __init__(self, dim: int, hidden_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = LPI(hidden_dim, **dd)
        self.gamma = nn.Parameter(torch.ones(hidden_dim, **dd))
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        hidden = self.fc1(x)
        local = self.dwconv.conv1(hidden.transpose(1, 2).unflatten(2, (H, W))).permute(0, 2, 3, 1)
        local = batch_norm(gelu(local), self.dwconv.bn).permute(0, 3, 1, 2)
        last = self.dwconv.conv2
        # The scale of the branch is that of its last layer's weights.
        weight, bias = self.gamma.view(-1, 1, 1, 1) * last.weight, self.gamma * last.get_parameter("bias")
        local = F.conv2d(local, weight, bias, padding=1, groups=len(bias)).flatten(2).transpose(1, 2)
        return self.fc2(local.add_(hidden) if is_eager_cpu_inference(local) else local + hidden)


class ChannelProcessing(nn.Module):
    """Channels gated by how they attend to the mean of their head (FAN's efficient channel attention).

    With softmax over tokens, `g = temperature · sigmoid(softmax(q)ᵀ · mean_d softmax(x))` for each channel of each
    head, and `y = g · LayerNorm(MLP(x))`.

    Args:
        dim: width C.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: bias on queries.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, mlp_ratio: float = 4.0, qkv_bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.mlp_v = _LocalMlp(dim, int(mlp_ratio * dim), **dd)
        self.norm_v = nn.LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)

    def gates(self, x: Tensor) -> Tensor:
        """One factor for each channel of each image: `[B, N, C]` → `[B, 1, C]`, from 0 to its head's temperature."""
        q = self.q(x).softmax(1).unflatten(2, (self.num_heads, -1))  # [B, N, h, d]
        k = x.softmax(1).unflatten(2, (self.num_heads, -1)).mean(-1, keepdim=True)  # [B, N, h, 1]
        return ((q * k).sum(1, keepdim=True).sigmoid() * self.temperature.view(-1, 1)).flatten(2)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`; the N = H * W tokens are a map, row by row."""
        return self.gates(x) * self.norm_v(self.mlp_v(x, H, W))


class FANBlock(nn.Module):
    """Token mixing and channel processing, both pre-norm and scaled by channel; TAP before the former if asked for.

    Queries, keys and values are of pooled tokens, the shortcut is of the tokens themselves.

    Args:
        dim: width C.
        num_heads: heads of both parts.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: bias on queries, keys and values.
        num_scales: of the pooling; 1 for none.
        drop_path: rate of stochastic depth.
        eta: where the scales of the two parts start.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_scales: int = 4,
        drop_path: float = 0.0,
        eta: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dilation_predictor = TokenAwareAveragePooling(dim, num_scales, **dd) if num_scales > 1 else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = TokenMixing(dim, num_heads, qkv_bias, **dd)
        self.gamma1 = nn.Parameter(torch.full((dim,), eta, **dd))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ChannelProcessing(dim, num_heads, mlp_ratio, qkv_bias, **dd)
        self.gamma2 = nn.Parameter(torch.full((dim,), eta, **dd))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`; the N = H * W tokens are a map, row by row."""
        pooled = x if self.dilation_predictor is None else self.dilation_predictor(x, (H, W))
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(pooled), H, W))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), H, W))


class LayerNorm2dUnbiased(LayerNorm2d):
    """LayerNorm over the channels of `[B, C, H, W]` that divides by the unbiased deviation (C - 1 instead of C).

    The published hybrids were trained so by accident: their norm takes another path when its input is not contiguous,
    which holds for all but the first. Here it is a property of the layer, and not of how its input lies in memory.
    Equal to the ordinary norm with eps and weight rescaled, so it runs at its speed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C, H, W]`, in channels-last memory."""
        ratio = (self.normalized_shape[0] - 1) / self.normalized_shape[0]
        weight = self.weight * math.sqrt(ratio)
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, weight, self.bias, self.eps * ratio)
        return x.permute(0, 3, 1, 2)


@register_notrace_module
class _ConvNeXtBlock(ConvNeXtBlock):
    """timm's block with linear layers for 1x1 convolutions, and the scale of the branch in the last one's weights."""

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2, gamma = self.mlp.fc1, self.mlp.fc2, self.get_parameter("gamma")
        hidden = gelu(F.linear(self.norm(self.conv_dw(x)).permute(0, 2, 3, 1), fc1.weight.flatten(1), fc1.bias))
        weight, bias = gamma.unsqueeze(1) * fc2.weight.flatten(1), gamma * fc2.get_parameter("bias")
        return x + F.linear(hidden, weight, bias).permute(0, 3, 1, 2)


class _ConvNeXtStage(nn.Module):
    """Blocks at one stride; in all stages but the first after a halving of the map."""

    def __init__(self, in_chs: int, out_chs: int, depth: int, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = partial(LayerNorm2dUnbiased, eps=1e-6)
        self.downsample = (
            nn.Identity()
            if in_chs == out_chs
            else nn.Sequential(norm_layer(in_chs, **dd), nn.Conv2d(in_chs, out_chs, 2, 2, **dd))
        )
        self.blocks = nn.Sequential(
            *(_ConvNeXtBlock(out_chs, conv_mlp=True, norm_layer=norm_layer, **dd) for _ in range(depth))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _ConvNeXtStages(nn.Module):
    """A stem at stride 4 and stages of ConvNeXt blocks, each after the first at half the size and twice the width."""

    def __init__(self, in_chans: int, depths: Sequence[int], embed_dim: int = 128, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, 4, **dd), LayerNorm2d(embed_dim, eps=1e-6, **dd))
        self.stages = nn.ModuleList(
            _ConvNeXtStage(embed_dim * 2 ** max(i - 1, 0), embed_dim * 2**i, depth, **dd)
            for i, depth in enumerate(depths)
        )
        self.num_features = embed_dim * 2 ** (len(depths) - 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to the map after each stage."""
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class HybridEmbed(nn.Module):
    """Images to tokens by stages of ConvNeXt and a 2x2 convolution; called as XCiT's patch embedding is."""

    def __init__(self, in_chans: int, depths: Sequence[int], embed_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.backbone = _ConvNeXtStages(in_chans, depths, device=device, dtype=dtype)
        self.proj: nn.Module = nn.Conv2d(self.backbone.num_features, embed_dim, 2, 2, device=device, dtype=dtype)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.get_parameter("bias"))

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The last stage's map to tokens `[B, N, C]` and their grid `(H, W)`."""
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        # One image at a time, since early maps are large.
        return self.tokens(in_parts(lambda images: self.backbone(images)[-1], x, 1, self))
