"""How much the vision encoder attends to what each image token stands for, family by family.

The score of a patch is the attention that it receives in one layer of the vision encoder: from the class token where
there is one, else from all patches on average. :func:`importance` computes just that from the layer's input, so that
the encoder may run with any attention implementation. An image token then stands for one patch, for the mean of
several, for a line break in pictures of any resolution (see :data:`TO_TOKENS`), or for what a latent of AKI's resampler
read of all patches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from .attention import uncompiled
from .layout import arguments_of, family_of

__all__ = [
    "TO_TOKENS",
    "Heard",
    "importance",
    "listen_to",
    "listening",
    "packed_importance",
    "scored_attention",
    "token_scores",
]

_CHUNK_BYTES = 64 * 2**20  # of attention weights at once


@torch.no_grad()
def importance(attention: Any, hidden: Tensor, *, class_token: bool, mask: Tensor | None = None) -> Tensor:
    """Attention that patches receive in a layer of a vision encoder, on average over its heads.

    Args:
        attention: Self-attention with `q_proj`, `k_proj`, `num_heads` and `scale`.
        hidden: What it is given, `[B, N, C]`; the class token first where there is one.
        class_token: The class token alone is asked, in O(N); else all patches, on average, in O(N²).
        mask: Added to the scores, or bool (True is seen), `[B, 1, N, N]`.

    Returns:
        `[B, N]`, without the class token `[B, N - 1]`; float32.
    """
    asking = hidden[:, :1] if class_token else hidden
    query, key = (
        projection(tokens).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [B, h, N, d]
        for projection, tokens in ((attention.q_proj, asking), (attention.k_proj, hidden))
    )
    received = _received(query, key, attention.scale, mask)
    return received[:, 1:] if class_token else received


@torch.no_grad()
def packed_importance(attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], bounds: Tensor) -> Tensor:
    """As :func:`importance`, for pictures of any size one after the other, as Qwen-VL has them.

    Args:
        attention: Self-attention with one `qkv`, `num_heads` and `scaling`.
        hidden: What it is given, `[N, C]`.
        rotary: Cosine and sine of the patches' positions.
        bounds: Where pictures begin, and the last ends.

    Returns:
        `[N]`, which sums to 1 for each picture; float32.
    """
    qkv = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1))  # [N, 3, h, d]
    query, key = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *rotary)
    pictures = (part.transpose(0, 1)[None].split(bounds.diff().tolist(), dim=2) for part in (query, key))
    return torch.cat([_received(q, k, attention.scaling)[0] for q, k in zip(*pictures, strict=True)])


def _received(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Mean over heads and queries of the attention that keys get: `[B, h, Q, d]`, `[B, h, N, d]` to `[B, N]`."""
    query, key = query.float() * scale, key.float()
    received = key.new_zeros(key.shape[0], key.shape[2])
    rows = max(_CHUNK_BYTES // (4 * key.shape[0] * key.shape[1] * key.shape[2]), 1)
    with torch.autocast(key.device.type, enabled=False):
        for start in range(0, query.shape[2], rows):
            scores = query[:, :, start : start + rows] @ key.transpose(2, 3)  # [B, h, q, N]
            if mask is not None:
                here = mask[:, :, start : start + rows]
                scores = scores.masked_fill(~here, -torch.inf) if here.dtype == torch.bool else scores + here
            received += scores.softmax(-1).sum(2).mean(1)
    return received / query.shape[2]


class Heard:
    """What was heard of a vision encoder while :func:`listening`.

    Attributes:
        scores: Of its patches, in one piece or, if it ran several times, in several.
        before_connector: Changes the features `[B, P, C]` that a connector of LLaVA or PaliGemma gets, if given.
    """

    def __init__(self, before_connector: Callable[[Heard, Tensor], Tensor] | None = None) -> None:
        self.scores: list[Tensor] = []
        self.before_connector = before_connector


_heard = ContextVar[Heard | None]("what is heard of a vision encoder", default=None)


@contextmanager
def listening(before_connector: Callable[[Heard, Tensor], Tensor] | None = None) -> Iterator[Heard]:
    """Collects the scores of patches that are encoded in this thread, by a model that is listened to."""
    token = _heard.set(heard := Heard(before_connector))
    try:
        yield heard
    finally:
        _heard.reset(token)


def scored_attention(model: PreTrainedModel) -> nn.Module:
    """The attention of the vision encoder whose weights rank the patches.

    Raises:
        TypeError: If it is not known where that is.
    """
    find = family_of(model).vision_attention
    try:
        attention = None if find is None else find(model)
    except AttributeError:
        attention = None
    if attention is None:
        raise TypeError(
            f"the attention of the vision encoder of this {type(model).__name__} cannot be read; give score='norm'"
        )
    return attention


def listen_to(model: PreTrainedModel) -> Callable[[], None]:
    """Hangs what :func:`listening` needs on a model's vision encoder and connector; returns what takes it off."""
    takers = []
    if (connector := getattr(model.base_model, "multi_modal_projector", None)) is not None:
        takers.append(connector.register_forward_pre_hook(uncompiled(_change)).remove)
    if (resampler := getattr(model, "vision_tokenizer", None)) is not None:
        last: nn.Module = resampler.layers[-1][0]
        takers.append(last.register_forward_pre_hook(uncompiled(_pass_on)).remove)
    with suppress(TypeError):  # tokens can be ranked without
        attention, class_token = scored_attention(model), family_of(model).class_token(model)
        hear = functools.partial(_hear, class_token)
        takers.append(attention.register_forward_pre_hook(uncompiled(hear), with_kwargs=True).remove)

    def take_off() -> None:
        for each in takers:
            each()

    return take_off


def _change(connector: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    heard = _heard.get()
    return None if heard is None or heard.before_connector is None else (heard.before_connector(heard, args[0]),)


def _hear(class_token: bool, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    if (heard := _heard.get()) is None:
        return
    given = arguments_of(attention, args, kwargs or {})
    hidden = given["hidden_states"]
    if hasattr(attention, "qkv"):
        scores = packed_importance(attention, hidden, given["position_embeddings"], given["cu_seqlens"])
    else:
        scores = importance(attention, hidden, class_token=class_token, mask=given.get("attention_mask"))
    heard.scores.append(scores)


@torch.no_grad()
def _pass_on(resampling: Any, args: tuple[Tensor, Tensor]) -> None:
    """In AKI's last resampler layer: a latent's score is that of the patches `[B, P]`, as far as it attends to them."""
    if (heard := _heard.get()) is None:
        return
    features, latents = args
    latents = resampling.norm_latents(latents)  # [B, V, C]
    key = resampling.to_kv(torch.cat((resampling.norm_media(features), latents), 1)).chunk(2, -1)[0]
    query, key = (
        tokens.unflatten(-1, (resampling.num_heads, -1)).transpose(1, 2).float()
        for tokens in (resampling.to_q(latents), key)
    )
    weights = (query @ key.transpose(2, 3) / resampling.head_dim**0.5).softmax(-1).mean(1)  # [B, V, P + V]
    heard.scores[-1] = (weights[..., : features.shape[1]] @ heard.scores[-1][..., None])[..., 0]


@torch.no_grad()
def token_scores(model: PreTrainedModel, heard: Heard, inputs: dict[str, Any], count: int) -> Tensor:
    """Scores of image tokens, in the order of the pictures.

    Args:
        model: The model.
        heard: Of its vision encoder.
        inputs: Those of its `get_image_features`, by name.
        count: How many image tokens there are.

    Returns:
        `[count]`, float32.

    Raises:
        ValueError: If the patches do not make so many tokens.
    """
    to_tokens = TO_TOKENS.get(str(model.config.model_type), _one_each)
    scores = to_tokens(model, torch.cat(heard.scores), inputs)
    if len(scores) != count:
        raise ValueError(
            f"{len(scores)} scores were found for {count} image tokens of a {type(model).__name__}; "
            "give score='norm' for a model whose connector makes other tokens than one for each patch"
        )
    return scores


def _one_each(model: Any, scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """A token for each patch."""
    return scores.flatten()


def _selected(model: Any, scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """LLaVA's choice of patches `[B, P]`: without the first token or with it. A class token itself scores highest."""
    strategy = inputs.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    class_token = family_of(model).class_token(model)
    if strategy == "full" and class_token:
        return torch.cat([scores.amax(1, keepdim=True), scores], 1)
    return scores[:, 1:] if strategy == "default" and not class_token else scores


def _any_resolution(model: Any, scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """LLaVA-NeXT and LLaVA-OneVision: packed as the features are. A line break has the mean score of its line."""
    config, sizes = model.config, inputs["image_sizes"]
    numbers = inputs.get("batch_num_images")
    alone = [True] * len(sizes) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
    tile = config.vision_config.image_size
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, tile) if cut else 1
        for size, cut in zip(sizes, alone, strict=True)
    ]
    features = _selected(model, scores, inputs)[..., None].split(tiles)  # a picture's [T, P, 1]
    newline = scores.new_full((1,), torch.nan)
    own: dict[str, Any]
    if config.model_type == "llava_next":
        own = {"vision_feature_select_strategy": inputs.get("vision_feature_select_strategy") or "default"}
    else:
        own = {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio}
    packed, _ = model.base_model.pack_image_features(features, sizes, image_newline=newline, **own)
    return torch.cat([_lines(picture[:, 0], tile // config.vision_config.patch_size) for picture in packed])


def _lines(scores: Tensor, side: int) -> Tensor:
    """Fills line breaks, which are NaN, with the mean of their line; the whole picture, of `side` squared, has none."""
    newline = scores.isnan()
    line = F.pad(newline.cumsum(0)[:-1], (1, 0))  # [N]
    first = min(side * side, len(scores) - 1) if len(scores) > side * side + 1 else 0
    where = torch.arange(len(scores), device=scores.device)
    counted = ~newline & (where >= first)
    sums = scores.new_zeros(len(scores)).index_add(0, line[counted], scores[counted])
    numbers = scores.new_zeros(len(scores)).index_add(0, line[counted], torch.ones_like(scores[counted]))
    return torch.where(newline, (sums / numbers.clamp(min=1))[line], scores)


def _merged_patches(model: Any, scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Qwen-VL: the mean over the patches that are merged; 2.5 goes through them window by window."""
    visual = model.base_model.visual
    scores = scores.view(-1, visual.spatial_merge_size**2).mean(1)
    if not hasattr(visual, "window_size"):
        return scores
    order, _ = get_vision_window_index(
        inputs["image_grid_thw"], visual.spatial_merge_size, visual.window_size, visual.patch_size
    )
    return torch.empty_like(scores).index_copy(0, order.to(scores.device), scores)


def _shuffled(model: Any, scores: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Idefics3 and SmolVLM: the mean over the patches that are shuffled into one token."""
    connector = model.base_model.connector
    return connector.pixel_shuffle(scores[..., None], connector.scale_factor).mean(-1).flatten()


TO_TOKENS: dict[str, Callable[[Any, Tensor, dict[str, Any]], Tensor]] = {
    "llava": lambda model, scores, inputs: _selected(model, scores, inputs).flatten(),
    "llava_next": _any_resolution,
    "llava_onevision": _any_resolution,
    "qwen2_vl": _merged_patches,
    "qwen2_5_vl": _merged_patches,
    "idefics3": _shuffled,
    "smolvlm": _shuffled,
}
"""From scores of patches, as the vision encoder has them, to those of image tokens, by `config.model_type`."""
