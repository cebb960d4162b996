"""Fewer visual tokens for LLaVA by the ways that VMTC is compared with: averaging, chance, and the decoder's attention.

Averaging and chance change what the decoder gets, so they are functions of features, put in place by `with_fewer`; the
decoder's attention is known inside it only, so `fastv` acts on the forwards of a `with` block. A row of the batch has
one picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchFeature, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

__all__ = ["fastv", "kept_at_random", "pooled", "with_fewer"]

Inputs = BatchFeature | dict[str, Any]


def pooled(features: Tensor, keep: int) -> Tensor:
    """Spatial down-sampling: averages over equal rectangles of the grid.

    Args:
        features: `[B, N, C]`, N a square.
        keep: How many are left: N divided by a power of two, whose odd power halves the columns once more.

    Returns:
        `[B, keep, C]`, by rows.

    Raises:
        ValueError: If the grid cannot be cut so.
    """
    side = math.isqrt(features.shape[1])
    columns = 1 << (keep.bit_length() - 1) // 2
    rows = keep // columns
    if side * side != features.shape[1] or rows * columns != keep or side % rows or side % columns:
        raise ValueError(f"{features.shape[1]} tokens cannot be averaged to {keep}: give a square, and a power of two")
    grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [B, C, H, W]
    return F.avg_pool2d(grid, (side // rows, side // columns)).flatten(2).transpose(1, 2)


def kept_at_random(features: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Tokens that are kept by chance, another choice for each picture, in their order: `[B, keep, C]`."""
    chance = torch.rand(features.shape[:2], generator=generator).to(features.device)
    kept = chance.topk(keep).indices.sort().values
    return features.take_along_dim(kept[..., None], 1)


def with_fewer(
    model: LlavaForConditionalGeneration, inputs: Inputs, fewer: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Inputs with the pictures encoded, and a prompt with as many placeholders as `fewer` leaves.

    Args:
        model: What encodes them.
        inputs: `input_ids`, `attention_mask` and `pixel_values`; one picture in each row.
        fewer: From `[B, N, C]` to `[B, n, C]`.
    """
    encode: Any = model.get_image_features
    encoded = encode(inputs["pixel_values"], return_dict=True)
    features = fewer(torch.stack(list(encoded.pooler_output)))
    encoded.pooler_output = list(features)
    image = inputs["input_ids"] == model.config.image_token_id
    keep = ~image | (image.cumsum(1) <= features.shape[1])  # [B, L]
    shrunk = {name: inputs[name][keep].unflatten(0, (len(keep), -1)) for name in ("input_ids", "attention_mask")}
    return {**shrunk, "mm_encoder_outputs": {"image": encoded}}


@contextmanager
def fastv(model: LlavaForConditionalGeneration, keep: int, after: int = 2) -> Iterator[None]:
    """Drops image tokens inside the decoder, by the attention that the last token pays them.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764: all tokens pass through the
    first layers; from then on only those image tokens remain that the last token of the prompt attended to most, on
    average over the heads, in the last of these layers. What remains keeps its position.

    Args:
        model: Its decoder is a Llama.
        keep: Image tokens that remain, in each row.
        after: How many layers see all (K).
    """
    pruning = _Pruning(keep, model.config.image_token_id)
    layers = model.model.language_model.layers
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(pruning.find, with_kwargs=True))
        attention = layers[after - 1].self_attn
        hooks.enter_context(attention.register_forward_pre_hook(pruning.rank, with_kwargs=True))
        for layer in layers[after:]:
            hooks.enter_context(layer.register_forward_pre_hook(pruning.prune, with_kwargs=True))
        yield


class _Pruning:
    """What one generation under `fastv` knows."""

    def __init__(self, keep: int, image_token_id: int) -> None:
        self.keep, self.image_token_id = keep, image_token_id
        self.image = self.kept = torch.empty(0)

    def find(self, _model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Where the image tokens are, once a prompt comes in."""
        if kwargs["input_ids"].shape[1] > 1:
            self.image = kwargs["input_ids"] == self.image_token_id

    def rank(self, attention: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        """Chooses the tokens that remain, as ascending indices `[B, n]`."""
        hidden, mask = kwargs["hidden_states"], kwargs["attention_mask"]
        if hidden.shape[1] == 1:
            return
        query, key = (
            proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        key = key.repeat_interleave(attention.num_key_value_groups, 1)
        scores = query[:, :, -1:] @ key.transpose(2, 3) * attention.scaling  # [B, h, 1, L]
        if mask is not None:
            last = mask[:, :, -1:, : scores.shape[-1]]
            scores = scores.masked_fill(~last, -math.inf) if last.dtype == torch.bool else scores + last
        paid = scores.float().softmax(-1).mean(1)[:, 0]  # [B, L]
        best = paid.masked_fill(~self.image, -1).topk(self.keep).indices
        chosen = (~self.image).scatter(1, best, True)
        self.kept = chosen.nonzero()[:, 1].unflatten(0, (len(chosen), -1))

    def prune(self, _layer: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Gives a layer what remains of tokens, positions and mask."""
        hidden, mask = args[0], kwargs["attention_mask"]
        length, changed = self.image.shape[1], dict(kwargs)
        columns, rows = self.kept, None
        if hidden.shape[1] > 1:  # the prompt
            rows = self.kept
            if hidden.shape[1] == length:
                hidden = hidden.take_along_dim(rows[..., None], 1)
            changed["position_embeddings"] = tuple(
                own.expand(len(rows), -1, -1).take_along_dim(rows[..., None], 1)
                for own in kwargs["position_embeddings"]
            )
        if mask is not None:
            new = torch.arange(length, mask.shape[-1], device=mask.device).expand(len(columns), -1)
            columns = torch.cat([columns, new], 1)
            mask = mask if rows is None else mask.take_along_dim(rows[:, None, :, None], 2)
            changed["attention_mask"] = mask.take_along_dim(columns[:, None, None], 3)
        return (hidden, *args[1:]), changed
