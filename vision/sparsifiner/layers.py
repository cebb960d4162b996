"""The parts of the networks around the attention: blocks, and LV-ViT's stem."""

import math
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp, PatchEmbed, to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from vision.inference import gelu, is_eager_cpu_inference
from vision.sparsifiner.attention import SparsifinerAttention

__all__ = ["LVViTStem", "SparsifinerBlock"]


class _GELU(nn.GELU):
    """GELU, in inference in place: the hidden layer of an MLP is the widest tensor and need not be there twice."""

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class SparsifinerBlock(nn.Module):
    """Pre-norm attention and MLP with shortcuts and drop path; may prune patch tokens.

    A pruned token is a row of zeros from its block on. That is how the next blocks know it, so that a block needs
    nothing but tokens; nothing is removed and no time is saved, as in the authors' code.

    Args:
        dim: width C.
        num_heads: number of heads.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: bias on queries, keys and values.
        proj_drop: dropout after the attention's projection and in the MLP.
        attn_drop: dropout on the attention.
        drop_path: rate of stochastic depth.
        skip_lam: both branches are divided by it (LV-ViT: 2).
        norm_layer: normalisation.
        act_layer: activation of the MLP.
        mlp_layer: the MLP.
        keep_in: share of the patch tokens that reach this block.
        keep_out: share of them that leave it; where smaller, those stay that the class token attends to most.
        device: of the parameters.
        dtype: of the parameters.
        **attention: arguments of `SparsifinerAttention`.
    """

    norm1: nn.Module
    attn: SparsifinerAttention

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        skip_lam: float = 1.0,
        norm_layer: type[nn.Module] = LayerNorm,
        act_layer: type[nn.Module] = _GELU,
        mlp_layer: type[nn.Module] = Mlp,
        keep_in: float = 1.0,
        keep_out: float = 1.0,
        device=None,
        dtype=None,
        **attention: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keep_in, self.keep_out = keep_in, keep_out
        self.skip_lam = skip_lam
        self.norm1 = norm_layer(dim, **dd)
        self.attn = SparsifinerAttention(
            dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **attention, **dd
        )
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`, the class token first; the mask is for the attention to refuse."""
        recorder = self.attn.recorder
        if self.keep_out == 1 or (recorder is not None and recorder.reconstruct):
            return self._branches(x, attn_mask=attn_mask, is_causal=is_causal)
        num_patches = x.shape[1] - 1
        kept, num_kept = None, None
        if self.keep_in < 1:
            num_kept = math.ceil(self.keep_in * num_patches)
            kept = (x != 0).any(-1)
        left = kept
        if self.keep_out < self.keep_in:
            left = self._most_attended(self.norm1(x), kept, math.ceil(self.keep_out * num_patches))
        x = self._branches(x, kept=kept, num_kept=num_kept, attn_mask=attn_mask, is_causal=is_causal)
        return x if left is None else x * left.unsqueeze(-1)

    def _branches(self, x: Tensor, **attention: Any) -> Tensor:
        share = 1 / self.skip_lam
        x = torch.add(x, self.drop_path1(self.attn(self.norm1(x), **attention)), alpha=share)
        return torch.add(x, self.drop_path2(self.mlp(self.norm2(x))), alpha=share)

    def _most_attended(self, x: Tensor, kept: Tensor | None, count: int) -> Tensor:
        """Marks the class token and the patch tokens, `[B, N]`, that it attends to most."""
        with torch.no_grad():
            score = self.attn.class_attention(x, kept)
            if kept is not None:
                score = score.masked_fill(~kept, -torch.inf)
            chosen = score[:, 1:].topk(count, sorted=False).indices + 1
            return (
                torch.zeros_like(score, dtype=torch.bool)
                .scatter_(1, chosen, True)
                .index_fill(1, chosen.new_zeros(1), True)
            )


class LVViTStem(PatchEmbed):
    """LV-ViT's patch embedding: three 3x3-like convolutions at half resolution, then patches of 8 × 8 of that.

    Args and methods are those of timm's `PatchEmbed`; `patch_size` is 16.
    """

    img_size: tuple[int, int]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        stem_dim: int = 64,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(img_size, patch_size, in_chans, embed_dim, bias=bias, dynamic_img_pad=dynamic_img_pad, **dd)
        self.conv1 = nn.Conv2d(in_chans, stem_dim, 7, 2, 3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_dim, **dd)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, 3, 1, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(stem_dim, **dd)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, 3, 1, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(stem_dim, **dd)
        self.proj = nn.Conv2d(stem_dim, embed_dim, patch_size // 2, patch_size // 2, bias=bias, **dd)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Fits the stem to another image size; the patch size is fixed."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f"patch_size={patch_size}: the stem of LV-ViT has patches of {self.patch_size}.")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` → `[B, N, C]`."""
        torch._assert(x.shape[-2] == self.img_size[0], f"Input height {x.shape[-2]}, model {self.img_size[0]}.")
        torch._assert(x.shape[-1] == self.img_size[1], f"Input width {x.shape[-1]}, model {self.img_size[1]}.")
        x = _conv_bn_relu(x, self.conv1, self.bn1)
        x = _conv_bn_relu(x, self.conv2, self.bn2)
        x = _conv_bn_relu(x, self.conv3, self.bn3)
        return self.proj(x).flatten(2).transpose(1, 2)


register_notrace_module(LVViTStem)


def _conv_bn_relu(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """Convolution, batch norm, ReLU; in inference the norm is a part of the convolution, for the maps are large."""
    if not is_eager_cpu_inference(x) or bn.training or bn.running_mean is None or bn.running_var is None:
        return bn(conv(x)).relu_()
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding).relu_()
