"""Modality-mutual attention as a part of AKI: its pictures read their question in every forward, without a switch."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache

from ..mma import MutualAttention, modality_mutual_attention, open_mask, refuse_leaks

if TYPE_CHECKING:
    from .modeling import AkiForConditionalGeneration

__all__ = ["mutual_arguments", "note_unfinished"]

# Rows of a cache in which a picture has no end of a question behind it, `[B]` bool.
_unfinished = weakref.WeakKeyDictionary[Cache, Tensor]()


def mutual_arguments(
    model: AkiForConditionalGeneration, ids: Tensor, given: dict[str, Any], labels: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of the language model's forward, with a mask in which pictures see their question.

    Where the switch `multimodal.modality_mutual_attention` is on, what it was told is done instead.

    Args:
        model: The model.
        ids: `[B, L]`.
        given: The arguments by name, with `inputs_embeds`, `attention_mask` and `cache`.
        labels: `[B, L]`.

    Raises:
        ValueError: Labels stand on text that a picture sees; a question came in parts; or the attention implementation
            takes no such mask.
    """
    cache = given["cache"]
    first = 0 if cache is None else int(cache.get_seq_length())
    decoding = first > 0 and ids.shape[1] == 1  # nothing comes after a single token
    if decoding or not model.config.modality_mutual or modality_mutual_attention.active(model) is not None:
        return given
    _refuse_parts(model, ids, cache)
    settings = MutualAttention((model.config.stop_token_id,), "segment", None)
    spans = settings.spans(model, ids, given["attention_mask"], offset=first)
    refuse_leaks(spans, labels)
    if not spans.opened.any():  # captions, text alone: causal, which has faster kernels than a mask
        return given
    return {**given, "attention_mask": open_mask(model.get_decoder(), given, spans)}


def note_unfinished(model: AkiForConditionalGeneration, ids: Tensor, cache: Cache | None) -> None:
    """After a forward: remembers of its cache where a question may still come, which its pictures then cannot see."""
    if cache is not None and ids.shape[1] > 1:
        image, marker = ids == model.config.image_token_id, ids == model.config.stop_token_id
        marker_behind = marker.flip(1).cummax(1).values.flip(1)
        _unfinished[cache] = (image & ~marker_behind).any(1)


def _refuse_parts(model: AkiForConditionalGeneration, ids: Tensor, cache: Cache | None) -> None:
    unfinished = None if cache is None else _unfinished.get(cache)
    if unfinished is None:
        return
    ends = (ids == model.config.stop_token_id).any(1)
    if len(ends) == len(unfinished) and bool((ends & unfinished.to(ends.device)).any()):
        raise ValueError(
            "the question about a picture came after the forward that the picture was in, so that the picture cannot "
            "read it; give the prompt in one piece (without prefill_chunk_size)"
        )
