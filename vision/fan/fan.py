"""The network of FAN, its official checkpoints and its registered variants."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from timm.models.xcit import ConvPatchEmbed, Xcit
from torch import Tensor, nn

import weights
from vision.fan.layers import FANBlock, HybridEmbed
from vision.inference import in_parts
from vision.pyramid import imagenet_cfg

__all__ = ["FAN", "checkpoint_filter_fn"]

_POOLS = ("", "avg", "token")
_TOKENS_AT_ONCE = 392  # in inference on a CPU: enough rows for a matrix product, little enough for the cache


class FAN(Xcit):
    """Fully attentional network: an XCiT with `FANBlock`s, and for hybrids with ConvNeXt stages before the tokens.

    Takes any image size from 16 pixels on; tokens are at stride 16. Features for detection and segmentation
    (`features_only`, `forward_intermediates`) are the stages of a hybrid, at strides 4 and 8, and then the blocks.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for none.
        global_pool: 'token' (the class token), 'avg' (the mean of the others) or '' (all tokens).
        img_size: recorded for preprocessing; no weight depends on it.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: heads per block.
        mlp_ratio: hidden width of the MLPs over the tokens' width.
        qkv_bias: bias on queries, keys and values.
        num_scales: of the token-aware average pooling (TAP) before each attention; 1 for none.
        hybrid_depths: blocks of each ConvNeXt stage; None for four convolutions instead.
        cls_attn_layers: number of class attention blocks after the others.
        eta: where the scales of the blocks' parts start.
        head_init_scale: factor on the classifier's first weights.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, the same in all blocks; class attention has none.

    Raises:
        ValueError: an unknown `global_pool`.
    """

    patch_embed: ConvPatchEmbed | HybridEmbed
    pos_embed: nn.Module | None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        img_size: int | tuple[int, int] | None = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_scales: int = 1,
        hybrid_depths: Sequence[int] | None = None,
        cls_attn_layers: int = 2,
        eta: float = 1.0,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_pool(global_pool)
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=0,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            cls_attn_layers=cls_attn_layers,
            eta=eta,
            tokens_norm=True,
            **dd,
        )
        self.blocks.extend(
            FANBlock(embed_dim, num_heads, mlp_ratio, qkv_bias, num_scales, drop_path_rate, eta, **dd)
            for _ in range(depth)
        )
        self.blocks.apply(self._init_weights)
        self.feature_info = [{"num_chs": embed_dim, "reduction": 16, "module": f"blocks.{i}"} for i in range(depth)]
        if hybrid_depths is not None:
            self.patch_embed = HybridEmbed(in_chans, hybrid_depths, embed_dim, **dd)
            self.feature_info = [
                {"num_chs": 128 * 2**i, "reduction": 4 * 2**i, "module": f"patch_embed.backbone.stages.{i}"}
                for i in range(len(hybrid_depths))
            ] + self.feature_info
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int] | None) -> None:
        """Records the image size that the model is meant for; no weight depends on it and any other size runs too.

        Args:
            img_size: `(height, width)` or one number for both, in pixels; None for the size of the pretrained weights.
        """
        update_model_input_size(self, img_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a fresh classifier on top.

        Args:
            num_classes: 0 removes the classifier.
            global_pool: as in the constructor; None keeps it.
        """
        _check_pool(self.global_pool if global_pool is None else global_pool)
        super().reset_classifier(num_classes, global_pool)
        self._init_weights(self.head)

    def no_weight_decay(self) -> set[str]:
        """The class token and the projection of positions."""
        return {name for name, _ in self.named_parameters() if name.startswith(("cls_token", "pos_embed."))}

    def _with_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Adds what tells positions; the same for every image."""
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed(1, *grid).flatten(2).transpose(1, 2)
        return tokens.contiguous()  # convolutions may have left them channel by channel

    def _run_block(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return checkpoint(block, x, *grid) if self.grad_checkpointing else block(x, *grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to normed tokens, `[B, 1 + N, C]`, the class token first."""
        x, grid = self.patch_embed(x)
        x = self._with_positions(x, grid)
        return self._finish(in_parts(lambda part: self._run_blocks(part, grid), x, _TOKENS_AT_ONCE * x.shape[2], self))

    def _run_blocks(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        for block in self.blocks:
            x = self._run_block(block, x, grid)
        return x

    def _finish(self, x: Tensor) -> Tensor:
        """Class attention and the final norm."""
        return self.norm(x if self.cls_attn_blocks is None else self.forward_cls(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What the stages of a hybrid and the blocks give, in the order of `feature_info`.

        Args:
            x: images, `[B, in_chans, H, W]`.
            indices: all for None, the last n for a number n, or a list of indices.
            norm: apply the final norm to outputs of blocks (it fits no other).
            stop_early: compute nothing past the last one asked for.
            output_fmt: 'NCHW', or 'NLC' for tokens.
            intermediates_only: leave out the final output.

        Returns:
            The list of maps `[B, C_i, H_i, W_i]` or tokens `[B, H_i * W_i, C_i]`; without `intermediates_only` a pair
            of `forward_features(x)` (with `stop_early` class attention follows the last block computed) and that list.

        Raises:
            ValueError: unknown `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: expected 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        maps: list[Tensor] = []
        num_stages = 0
        if isinstance(self.patch_embed, HybridEmbed):
            maps = self.patch_embed.backbone(x)
            num_stages = len(maps)
            if intermediates_only and last < num_stages:
                return [_formatted(maps[i], output_fmt) for i in take]
            x, grid = self.patch_embed.tokens(maps[-1])
            maps = [maps[i] for i in take if i < num_stages]
        else:
            x, grid = self.patch_embed(x)
        x = self._with_positions(x, grid)
        for i, block in enumerate(self.blocks[: last + 1 - num_stages] if stop_early else self.blocks, num_stages):
            x = self._run_block(block, x, grid)
            if i in take:
                maps.append((self.norm(x) if norm else x).transpose(1, 2).unflatten(2, grid))
        maps = [_formatted(y, output_fmt) for y in maps]
        return maps if intermediates_only else (self._finish(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> Sequence[int]:
        """Removes what the maps asked for do not need; returns their indices.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the final norm.
            prune_head: remove the classifier and class attention.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        num_stages = len(self.feature_info) - len(self.blocks)
        self.blocks = self.blocks[: max(last + 1 - num_stages, 0)]
        if last < num_stages and isinstance(self.patch_embed, HybridEmbed):
            self.patch_embed.backbone.stages = self.patch_embed.backbone.stages[: last + 1]
            self.patch_embed.proj = nn.Identity()
            self.pos_embed = None
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks = None
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.reset_classifier(0, "")
        return take


def _check_pool(global_pool: str) -> None:
    if global_pool not in _POOLS:
        raise ValueError(f"global_pool={global_pool!r}: expected one of {', '.join(map(repr, _POOLS))}.")


def _formatted(x: Tensor, output_fmt: str) -> Tensor:
    """A map `[B, C, H, W]` as asked for."""
    return x.flatten(2).transpose(1, 2) if output_fmt == "NLC" else x


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """The published files' nesting and prefixes taken off; the names are the authors' already.

    Args:
        state_dict: the content of a published file (state dict under "state_dict", beside an average of it under
            "state_dict_ema" that the published accuracy is not of; "module." before names), or a state dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.
    """
    for key in ("state_dict", "state_dict_ema"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def _cfg(weights_name: str | None = None, **kwargs) -> dict[str, Any]:
    return imagenet_cfg(weights_name, **{"pool_size": None, "crop_pct": 1.0, **kwargs})


_HYBRID = {"first_conv": "patch_embed.backbone.stem.0"}
_CONV = {"first_conv": "patch_embed.proj.0.0"}

default_cfgs = generate_default_cfgs(
    {
        "fan_tiny_8_p4_hybrid": _cfg(**_HYBRID),
        "fan_small_12_p4_hybrid": _cfg(**_HYBRID),
        "fan_base_16_p4_hybrid": _cfg(**_HYBRID),
        "fan_large_16_p4_hybrid": _cfg(**_HYBRID),
        "tap_fan_tiny_8_p4_hybrid": _cfg(**_HYBRID),
        "tap_fan_small_12_p4_hybrid": _cfg(**_HYBRID),
        "tap_fan_base_16_p4_hybrid.in1k": _cfg("tap_fan_base_16_p4_hybrid.in1k", **_HYBRID),
        "tap_fan_large_16_p4_hybrid": _cfg(**_HYBRID),
        "tap_fan_tiny_12_p16_224": _cfg(**_CONV),
        "tap_fan_small_12_p16_224": _cfg(**_CONV),
        "tap_fan_base_18_p16_224": _cfg(**_CONV),
        "tap_fan_large_24_p16_224": _cfg(**_CONV),
    }
)


def _create_fan(variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> FAN:
    hybrid = "hybrid_depths" in defaults
    return weights.build_model(
        FAN,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, -1) if hybrid else 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


_TINY_HYBRID = {"embed_dim": 192, "depth": 8, "num_heads": 8, "hybrid_depths": (3, 3)}
_SMALL_HYBRID = {"embed_dim": 384, "depth": 10, "num_heads": 8, "hybrid_depths": (3, 3)}
_BASE_HYBRID = {"embed_dim": 448, "depth": 16, "num_heads": 8, "hybrid_depths": (3, 3)}
_LARGE_HYBRID = {"embed_dim": 480, "depth": 22, "num_heads": 10, "hybrid_depths": (3, 5), "head_init_scale": 0.001}
_TAP = {"num_scales": 4}


@register_model
def fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-T-Hybrid: 7.5 M parameters, 3.6 GMACs at 224."""
    return _create_fan("fan_tiny_8_p4_hybrid", pretrained, _TINY_HYBRID, kwargs)


@register_model
def fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-S-Hybrid: 26.1 M parameters, 7.0 GMACs at 224; 10 blocks, whatever the name says."""
    return _create_fan("fan_small_12_p4_hybrid", pretrained, _SMALL_HYBRID, kwargs)


@register_model
def fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-B-Hybrid: 50.5 M parameters, 11.8 GMACs at 224, 83.9 % top-1 as published."""
    return _create_fan("fan_base_16_p4_hybrid", pretrained, _BASE_HYBRID, kwargs)


@register_model
def fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-L-Hybrid: 76.9 M parameters, 17.7 GMACs at 224; 22 blocks, whatever the name says."""
    return _create_fan("fan_large_16_p4_hybrid", pretrained, _LARGE_HYBRID, kwargs)


@register_model
def tap_fan_tiny_8_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-T-Hybrid with token-aware pooling: 7.5 M parameters, 3.7 GMACs at 224."""
    return _create_fan("tap_fan_tiny_8_p4_hybrid", pretrained, {**_TINY_HYBRID, **_TAP}, kwargs)


@register_model
def tap_fan_small_12_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-S-Hybrid with token-aware pooling: 26.3 M parameters, 7.0 GMACs at 224."""
    return _create_fan("tap_fan_small_12_p4_hybrid", pretrained, {**_SMALL_HYBRID, **_TAP}, kwargs)


@register_model
def tap_fan_base_16_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-B-Hybrid with token-aware pooling: 50.7 M parameters, 11.9 GMACs at 224, 84.3 % top-1 as published."""
    return _create_fan("tap_fan_base_16_p4_hybrid", pretrained, {**_BASE_HYBRID, **_TAP}, kwargs)


@register_model
def tap_fan_large_16_p4_hybrid(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-L-Hybrid with token-aware pooling: 77.2 M parameters, 17.8 GMACs at 224."""
    return _create_fan("tap_fan_large_16_p4_hybrid", pretrained, {**_LARGE_HYBRID, **_TAP}, kwargs)


@register_model
def tap_fan_tiny_12_p16_224(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-T of convolutional patches with token-aware pooling: 7.4 M parameters, 1.5 GMACs at 224."""
    defaults = {"embed_dim": 192, "depth": 12, "num_heads": 4, **_TAP}
    return _create_fan("tap_fan_tiny_12_p16_224", pretrained, defaults, kwargs)


@register_model
def tap_fan_small_12_p16_224(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-S of convolutional patches with token-aware pooling: 28.5 M parameters, 5.5 GMACs at 224."""
    defaults = {"embed_dim": 384, "depth": 12, "num_heads": 8, **_TAP}
    return _create_fan("tap_fan_small_12_p16_224", pretrained, defaults, kwargs)


@register_model
def tap_fan_base_18_p16_224(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-B of convolutional patches with token-aware pooling: 54.6 M parameters, 10.7 GMACs at 224."""
    defaults = {"embed_dim": 448, "depth": 18, "num_heads": 8, **_TAP}
    return _create_fan("tap_fan_base_18_p16_224", pretrained, defaults, kwargs)


@register_model
def tap_fan_large_24_p16_224(pretrained: bool = False, **kwargs) -> FAN:
    """FAN-L of convolutional patches with token-aware pooling: 81.0 M parameters, 16.0 GMACs at 224."""
    defaults = {"embed_dim": 480, "depth": 24, "num_heads": 10, **_TAP}
    return _create_fan("tap_fan_large_24_p16_224", pretrained, defaults, kwargs)
