"""Attention rollout: how much of each token has reached another through all layers, shortcuts included.

Paper: "Quantifying Attention Flow in Transformers", Abnar and Zuidema, ACL 2020, https://arxiv.org/abs/2005.00928.
With the head-averaged attention `A_l` of layer l, each layer mixes as `Ā_l = r A_l + (1 - r) I`, and n layers as
`Ā_n ⋯ Ā_1`. Rows of `A_l` sum to 1, so rows of the product do.

What differs from the usual code: one row of the product, which is what a class token needs, is computed as vector times
matrix from the newest layer to the oldest. That is exact and costs `O(n N²)` in place of `O(n N³)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision.attention import record_attention

__all__ = ["attention_rollout", "rollout", "rollout_row"]


def attention_rollout(maps: Sequence[Tensor], attention_share: float = 0.5) -> Tensor:
    """The whole product of all layers.

    Args:
        maps: attention per layer, the oldest first: `[B, h, N, N]`, or `[B, N, N]` where heads are averaged already.
        attention_share: r in the module's equation; the rest of each layer is its shortcut.

    Returns:
        `[B, N, N]`, rows sum to 1: row i says where token i has its content from.

    Raises:
        ValueError: no maps, maps that are not square or differ in N, or a share outside [0, 1].
    """
    product: Tensor | None = None
    for attn in _head_means(maps, attention_share):
        mixed = attention_share * attn + (1 - attention_share) * torch.eye(attn.shape[-1]).to(attn)
        product = mixed if product is None else mixed @ product
    assert product is not None  # `_head_means` refuses to be empty
    return product


def rollout_row(maps: Sequence[Tensor], query: int | Tensor = 0, attention_share: float = 0.5) -> Tensor:
    """One row of `attention_rollout`, without the rest of it.

    Args:
        maps: as in `attention_rollout`.
        query: the row, 0 for the class token; or weights over the rows, `[N]` or `[B, N]`, for a mixture of them.
        attention_share: as in `attention_rollout`.

    Returns:
        `[B, N]`, sums to 1 (a mixture to the sum of its weights).

    Raises:
        ValueError: as `attention_rollout`.
    """
    means = _head_means(maps, attention_share)
    row: Tensor | None = None
    if isinstance(query, Tensor):
        row = query.to(means[0]).expand(means[0].shape[:2])
    for attn in reversed(means):
        if row is None:  # the newest layer's own row: no product yet
            row = attention_share * attn[:, query]
            row[:, query] += 1 - attention_share
        else:
            row = attention_share * torch.bmm(row.unsqueeze(1), attn).squeeze(1) + (1 - attention_share) * row
    assert row is not None
    return row


def rollout(model: nn.Module, images: Tensor, attention_share: float = 0.5) -> Tensor:
    """Where the content of a vision transformer's class token comes from.

    For any network whose blocks' attention can be recorded (`vision.attention.record_attention`) and runs over all
    tokens: timm's ViT, DeiT, EVA, BEiT and those of this package. A network that pools its patches is asked for their
    mean. Runs the network as it is: put it into evaluation mode first.

    Args:
        model: with `blocks` and `patch_embed`.
        images: normalised, `[B, C, H, W]`; one is processed at a time, so that memory is that of one image's maps.
        attention_share: as in `attention_rollout`.

    Returns:
        `[B, h, w]`, one value per patch, not negative; sums to at most 1, class tokens have the rest.

    Raises:
        ValueError: a network without blocks and patches, or whose attention cannot be recorded or multiplied.
    """
    blocks, patch_embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    if not isinstance(blocks, nn.Module) or not hasattr(patch_embed, "dynamic_feat_size"):
        raise ValueError(
            f"{type(model).__name__} has no `blocks` and `patch_embed` to roll out; expected a vision transformer, "
            "for others use vision.explain.heatmap."
        )
    h, w = patch_embed.dynamic_feat_size(images.shape[-2:])  # pyright: ignore[reportOptionalMemberAccess]
    rows = []
    for image in images.split(1):
        with torch.no_grad(), record_attention(blocks) as layers:
            model(image)
        maps = [layer_map.attn for kept in layers.values() for layer_map in kept]
        if not maps:
            raise ValueError(f"{type(model).__name__} has no attention in its blocks that can be recorded.")
        prefix = maps[0].shape[-1] - h * w  # class and register tokens
        if prefix < 0:
            raise ValueError(f"attention over {maps[0].shape[-1]} tokens, but {h} * {w} patches: some were dropped.")
        query: int | Tensor = 0
        if prefix == 0 or getattr(model, "global_pool", "token") not in ("token", ""):
            query = torch.full((prefix + h * w,), 1 / (h * w))
            query[:prefix] = 0
        rows.append(rollout_row(maps, query, attention_share)[:, prefix:])
    return torch.cat(rows).unflatten(1, (h, w))


def _head_means(maps: Sequence[Tensor], attention_share: float) -> list[Tensor]:
    """The maps as `[B, N, N]`, at least in single precision."""
    if not 0 <= attention_share <= 1:
        raise ValueError(f"attention_share={attention_share} must be from 0 to 1.")
    if not maps:
        raise ValueError("no attention maps to multiply; expected one per layer, [B, h, N, N] or [B, N, N].")
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    means = [attn.mean(1, dtype=dtype) if attn.ndim == 4 else attn.to(dtype) for attn in maps]
    first = means[0].shape
    if len(first) != 3 or first[1] != first[2] or any(attn.shape != first for attn in means):
        raise ValueError(
            f"attention maps of shapes {sorted({tuple(attn.shape) for attn in maps})}; expected the same tokens as "
            "queries and keys in every layer, [B, h, N, N] or [B, N, N]."
        )
    return means
