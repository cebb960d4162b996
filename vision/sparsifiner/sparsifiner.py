"""The networks: DeiT and LV-ViT with sparse attention, and their timm entries."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, PatchEmbed, get_device_dtype, resample_abs_pos_embed, to_2tuple
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._input import update_model_args
from torch import Tensor, nn

from vision.sparsifiner.attention import AttentionPath, SparsifinerAttention
from vision.sparsifiner.layers import LVViTStem, SparsifinerBlock
from vision.sparsifiner.predictor import ConnectivityPredictor

__all__ = [
    "Sparsifiner",
    "SparsifinerLVViT",
    "checkpoint_filter_fn",
]


# What timm passes to every block, with values that these networks do not let vary.
_UNUSED = ("qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "attn_layer", "act_layer")


class Sparsifiner(VisionTransformer):
    """DeiT with predicted, sparse attention; timm's `VisionTransformer` in everything else.

    The predictor's matrices have a row per token, so the network is built for one image size; `set_input_size` and
    `checkpoint_filter_fn` resample them and the position embedding to another.

    Args:
        img_size: `(height, width)` or one number for both, in pixels; multiples of `patch_size`.
        patch_size: side of a patch.
        in_chans: channels of the images.
        num_classes: 0 for none.
        global_pool: as in timm's `VisionTransformer`.
        embed_dim: width.
        depth: number of blocks.
        num_heads: heads per block.
        mlp_ratio: hidden width of the MLPs over the width.
        qkv_bias: bias on queries, keys and values.
        skip_lam: both branches of a block are divided by it.
        fc_norm: as in timm's `VisionTransformer`.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        proj_drop_rate: dropout after projections.
        attn_drop_rate: dropout on the attention.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        weight_init: as in timm's `VisionTransformer`.
        embed_layer: from images to patch tokens.
        norm_layer: normalisation; LayerNorm with eps 1e-6 by default.
        prune_at: blocks after which patch tokens are pruned.
        token_keep_rate: share of tokens (r) that stay after pruning in the second quarter of the blocks; r² stay in
            the third, r³ in the last.
        device: of the parameters.
        dtype: of the parameters.
        **attention: arguments of `SparsifinerAttention` and `ConnectivityPredictor`: `keep_rate`, `score_threshold`,
            `attention_path`, `prune_query_rows`, `rank`, `rank_reduction`, `channel_reduction`, `basis_threshold`,
            `coef_top_k`, `coef_threshold`, `share_proj`.

    Raises:
        ValueError: an image size that is not whole patches, or an argument that its layer refuses.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        skip_lam: float = 1.0,
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        embed_layer: Any = PatchEmbed,
        norm_layer: Any = None,
        prune_at: Sequence[int] = (),
        token_keep_rate: float = 1.0,
        device=None,
        dtype=None,
        **attention: Any,
    ) -> None:
        grid = _grid(img_size, patch_size)
        rates = _keep_rates(depth, prune_at, token_keep_rate)

        def block(
            *, depth: int, qk_norm, scale_attn_norm, scale_mlp_norm, proj_bias, init_values, attn_layer, **kwargs
        ):
            # What is named here timm passes to every block, with values that this network does not let vary.
            return SparsifinerBlock(
                skip_lam=skip_lam, keep_in=rates[depth], keep_out=rates[depth + 1], **{**kwargs, **attention}
            )

        attention = {**attention, "num_tokens": 1 + math.prod(grid)}
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            num_classes,
            global_pool,  # pyright: ignore[reportArgumentType] - checked there
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            qkv_bias,
            fc_norm=fc_norm,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            weight_init=weight_init,  # pyright: ignore[reportArgumentType] - checked there
            embed_layer=embed_layer,
            norm_layer=norm_layer,
            block_fn=block,  # pyright: ignore[reportArgumentType] - only ever called
            device=device,
            dtype=dtype,
        )
        self._set_key_grid()

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of the grid of patches."""
        return _grid(self.patch_embed.img_size, self.patch_embed.patch_size)  # pyright: ignore[reportArgumentType]

    def _set_key_grid(self) -> None:
        for attn in self.attention_layers():
            attn.key_grid = self.grid_size

    def attention_layers(self) -> list[SparsifinerAttention]:
        """The attention of every block, in order."""
        return [module for module in self.blocks.modules() if isinstance(module, SparsifinerAttention)]

    def set_attention_path(self, path: AttentionPath) -> None:
        """Chooses how attention is computed in all blocks.

        Args:
            path: 'masked', 'gather', 'auto' for the faster of these two, which give the same; or 'dense' for attention
                to all keys: the network under this one, which is its teacher.

        Raises:
            ValueError: an unknown path, or 'gather' where `score_threshold` leaves the number of keys open.
        """
        for attn in self.attention_layers():
            attn.set_attention_path(path)
        update_model_args(self, attention_path=path)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Fits the network to another image size, keeping its weights.

        Position embedding and predictors are resampled over the grid of patches; the predictors' rank stays.

        Args:
            img_size: `(height, width)` or one number for both, in pixels; None for no change.
            patch_size: side of a patch; None for no change.

        Raises:
            ValueError: an image size that is not whole patches.
        """
        old: Any = self.patch_embed.img_size, self.patch_embed.patch_size
        size: Any = old[0] if img_size is None else to_2tuple(img_size)
        new_grid = _grid(size, patch_size or old[1])
        super().set_input_size(size, patch_size)  # pyright: ignore[reportArgumentType]
        for attn in self.attention_layers():
            attn.mask_predictor.set_grid(new_grid, _grid(*old))
            update_model_args(self, rank=attn.mask_predictor.rank)  # where it no longer follows from the image size
        self._set_key_grid()

    def no_weight_decay(self) -> set[str]:
        """Parameters beyond the 1-D ones that must not decay.

        With the predictors among them: trained without `SparsifinerCriterion` they get gradients of zero, and would
        decay to nothing.
        """
        predictors = {name for name, _ in self.named_parameters() if ".mask_predictor." in name}
        return super().no_weight_decay() | predictors


def _grid(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in patches."""
    image: Any = to_2tuple(img_size)
    patch: Any = to_2tuple(patch_size)
    if any(i < p or i % p for i, p in zip(image, patch, strict=True)):
        raise ValueError(f"img_size={img_size} is not whole patches of patch_size={patch_size}; pass multiples of it.")
    return image[0] // patch[0], image[1] // patch[1]


def _keep_rates(depth: int, prune_at: Sequence[int], rate: float) -> list[float]:
    """Share of the patch tokens before each block, and after the last."""
    if not 0 < rate <= 1:
        raise ValueError(f"token_keep_rate={rate} is a share of tokens; expected more than 0 and at most 1.")
    if strange := [i for i in prune_at if not 0 <= i < depth]:
        raise ValueError(f"prune_at={strange}: expected indices of blocks, 0 to {depth - 1}.")
    rates = [1.0]
    for i in range(depth):
        rates.append(rate ** (4 * i // depth) if i in prune_at else rates[-1])
    return rates


class SparsifinerLVViT(Sparsifiner):
    """LV-ViT with predicted, sparse attention: a convolutional stem, halved branches, a second head on the patches.

    In evaluation the logits are those of the class token and half of the largest that any patch has in `aux_head`; in
    training the class token's alone, and `aux_head` is trained by `SparsifinerCriterion`.

    Args and errors are those of `Sparsifiner`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults: dict[str, Any] = {
            "mlp_ratio": 3.0,
            "qkv_bias": False,
            "skip_lam": 2.0,
            "embed_layer": LVViTStem,
            "norm_layer": partial(LayerNorm, eps=1e-5),
        }
        super().__init__(*args, **{**defaults, **kwargs})
        self.aux_head = self._aux_head()

    def _aux_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        dd: Any = get_device_dtype(self)
        head = nn.Linear(self.num_features, self.num_classes, **dd)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The heads of the class token and of the patches."""
        return self.head, self.aux_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts two fresh heads on top; 0 removes both."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._aux_head()
        self.aux_head.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens `[B, N, C]` to logits `[B, num_classes]`, or to pooled features with `pre_logits`."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or not self.num_classes or not self.global_pool:
            return logits
        aux = self.aux_head(x[:, self.num_prefix_tokens :])  # [B, N - 1, num_classes]
        # A weight of 0 leaves the output to whoever listens to `aux_head`, and gives all others a gradient of zeros.
        return logits + (0.0 if self.training else 0.5) * aux.amax(1)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Fits a published file to a network.

    A file without any predictor (DeiT, LV-ViT) fills the dense part and leaves the network's predictors as they are.
    Position embedding and predictors of another, square grid of patches are resampled.

    Args:
        state_dict: the content of a published file (state dict under "model" or "state_dict", or bare), or a state
            dict of ours.
        model: the network it is for.

    Returns:
        A state dict that `model` loads strictly.

    Raises:
        ValueError: predictors of another rank.
    """
    for key in ("model", "state_dict"):
        state_dict = state_dict.get(key, state_dict)
    state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if not isinstance(model, Sparsifiner):
        return state_dict
    if not any(".mask_predictor." in name for name in state_dict):
        own = model.state_dict()
        state_dict |= {name: tensor for name, tensor in own.items() if ".mask_predictor." in name}
    grid = model.grid_size
    pos_embed = state_dict.get("pos_embed")
    if pos_embed is not None and model.pos_embed is not None and pos_embed.shape != model.pos_embed.shape:
        state_dict["pos_embed"] = resample_abs_pos_embed(pos_embed, list(grid), num_prefix_tokens=1)
    for name, module in model.named_modules():
        if isinstance(module, ConnectivityPredictor):
            _fit_predictor(state_dict, f"{name}.", module, grid)
    return state_dict


def _fit_predictor(
    state_dict: dict[str, Tensor], prefix: str, predictor: ConnectivityPredictor, grid: tuple[int, int]
) -> None:
    """Fits the matrices of one predictor in place."""
    if predictor.share_proj and f"{prefix}proj_back_n" in state_dict:  # listed twice in the authors' files
        state_dict[f"{prefix}proj_n"] = state_dict.pop(f"{prefix}proj_back_n")
    for name in ("proj_n", "proj_back_n"):
        matrix = state_dict.get(prefix + name)
        if matrix is None or matrix.shape == predictor.proj_n.shape:
            continue
        if matrix.shape[1] != predictor.rank:
            raise ValueError(
                f"{prefix}{name} has rank {matrix.shape[1]}, the network {predictor.rank}; build it with "
                f"rank={matrix.shape[1]}."
            )
        side = math.isqrt(len(matrix) - 1)
        state_dict[prefix + name] = predictor.resampled(name, matrix, grid, (side, side))


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2303.13755",
        "paper_name": "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        "origin_url": "https://github.com/lim142857/Sparsifiner",
        **kwargs,
    }


def _lvvit_cfg(size: int = 224) -> dict[str, Any]:
    return _cfg(size, first_conv="patch_embed.conv1", classifier=("head", "aux_head"))


# The authors have published no weights.
default_cfgs = generate_default_cfgs(
    {
        "sparsifiner_deit_tiny_patch16_224": _cfg(),
        "sparsifiner_deit_small_patch16_224": _cfg(),
        "sparsifiner_deit_base_patch16_224": _cfg(),
        "sparsifiner_deit_tiny_patch16_384": _cfg(384),
        "sparsifiner_deit_small_patch16_384": _cfg(384),
        "sparsifiner_deit_base_patch16_384": _cfg(384),
        "sparsifiner_lvvit_small": _lvvit_cfg(),
        "sparsifiner_lvvit_medium": _lvvit_cfg(),
        "sparsifiner_lvvit_small_384": _lvvit_cfg(384),
        "sparsifiner_lvvit_medium_384": _lvvit_cfg(384),
    }
)


def _create(model_cls: type[Sparsifiner], variant: str, pretrained: bool, defaults: dict, kwargs: dict) -> Sparsifiner:
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LVVIT_SMALL = {"embed_dim": 384, "depth": 16, "num_heads": 6}
_LVVIT_MEDIUM = {"embed_dim": 512, "depth": 20, "num_heads": 8}


@register_model
def sparsifiner_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-Ti: 5.9 M parameters."""
    return _create(Sparsifiner, "sparsifiner_deit_tiny_patch16_224", pretrained, _TINY, kwargs)


@register_model
def sparsifiner_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-S: 22.3 M parameters, 79.83 % top-1 as published at a keep rate of 0.3."""
    return _create(Sparsifiner, "sparsifiner_deit_small_patch16_224", pretrained, _SMALL, kwargs)


@register_model
def sparsifiner_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-B: 86.8 M parameters."""
    return _create(Sparsifiner, "sparsifiner_deit_base_patch16_224", pretrained, _BASE, kwargs)


@register_model
def sparsifiner_deit_tiny_patch16_384(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-Ti for images of 384 pixels."""
    return _create(Sparsifiner, "sparsifiner_deit_tiny_patch16_384", pretrained, {"img_size": 384, **_TINY}, kwargs)


@register_model
def sparsifiner_deit_small_patch16_384(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-S for images of 384 pixels."""
    return _create(Sparsifiner, "sparsifiner_deit_small_patch16_384", pretrained, {"img_size": 384, **_SMALL}, kwargs)


@register_model
def sparsifiner_deit_base_patch16_384(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on DeiT-B for images of 384 pixels."""
    return _create(Sparsifiner, "sparsifiner_deit_base_patch16_384", pretrained, {"img_size": 384, **_BASE}, kwargs)


@register_model
def sparsifiner_lvvit_small(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on LV-ViT-S: 26.4 M parameters, 83.3 % top-1 as published."""
    return _create(SparsifinerLVViT, "sparsifiner_lvvit_small", pretrained, _LVVIT_SMALL, kwargs)


@register_model
def sparsifiner_lvvit_medium(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on LV-ViT-M: 56.2 M parameters, 83.8 % top-1 as published."""
    return _create(SparsifinerLVViT, "sparsifiner_lvvit_medium", pretrained, _LVVIT_MEDIUM, kwargs)


@register_model
def sparsifiner_lvvit_small_384(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on LV-ViT-S for images of 384 pixels."""
    return _create(
        SparsifinerLVViT, "sparsifiner_lvvit_small_384", pretrained, {"img_size": 384, **_LVVIT_SMALL}, kwargs
    )


@register_model
def sparsifiner_lvvit_medium_384(pretrained: bool = False, **kwargs) -> Sparsifiner:
    """Sparsifiner on LV-ViT-M for images of 384 pixels."""
    return _create(
        SparsifinerLVViT, "sparsifiner_lvvit_medium_384", pretrained, {"img_size": 384, **_LVVIT_MEDIUM}, kwargs
    )
