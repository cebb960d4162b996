"""Modality-mutual attention (MMA): images read the question that is asked about them.

The method is that of Wang et al., "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention
for Multimodal LLMs" (AKI, 2025), https://arxiv.org/abs/2503.02597; the authors' code is
https://github.com/sony/aki (CC BY-NC 4.0). In a prompt the image comes before the question, so under a causal mask no
image token can read what is asked. MMA opens one rectangle of the mask, from image queries to the keys of the question:

    allowed(i, j) = (j <= i)  or  (i in image  and  j in question)

All else stays: text is causal, images among themselves too, no parameter is added and the cache is as large as before.

The authors' code knows one image and one question in a row: the text from the image to the row's first assistant
marker, that included. What it leaves open is ours: several images and turns, padding on the left, the text that is open
where no marker ends it, and the scopes other than "segment". In the authors' case "question" gives their mask too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices, or_masks
from transformers.utils import ModelOutput

from .attention import IMPLEMENTATIONS, base_implementation
from .hooks import Handover, around_generate
from .layout import cache_of, family_of, find_layout
from .spans import (
    Scope,
    Spans,
    as_stop_ids,
    check_scope,
    find_spans,
    find_stops,
    mutual_mask,
    refuse_leaks,
)
from .switches import Switch

__all__ = [
    "Found",
    "MutualAttention",
    "Scope",
    "Spans",
    "find_spans",
    "look",
    "modality_mutual_attention",
    "mutual_mask",
    "open_mask",
    "refuse_leaks",
    "remember",
]

_NAME = "modality-mutual attention"


def open_mask(decoder: PreTrainedModel, given: dict[str, Any], spans: Spans) -> Any:
    """The attention mask of a decoder's forward, opened where images look.

    Args:
        decoder: A language model of transformers.
        given: The arguments of its forward by name: `inputs_embeds`, a mask `[B, K]` or one that is prepared already,
            and the cache, if any.
        spans: Of the tokens of this forward.

    Returns:
        A prepared mask, as the decoder takes it: a tensor `[B, 1, L, K]`, a `BlockMask`, or one of them for each kind
        of layer. What its own mask shows stays seen, and padding is not.

    Raises:
        ValueError: For an attention implementation that takes no such mask, or for several sequences in one row.
    """
    _check_implementation(decoder)
    embeds, cache, mask = given["inputs_embeds"], cache_of(given), given.get("attention_mask")
    spans = spans.to(embeds.device)
    if not (isinstance(mask, dict | BlockMask) or (isinstance(mask, Tensor) and mask.ndim == 4)):
        _refuse_packed(decoder, given)
        mask = create_masks_for_generate(decoder.config, embeds, mask, cache)
    if mask is None and not _is_causal(decoder):
        return None  # every token sees every other
    if not isinstance(mask, dict):
        return _opened(mask, spans, cache, 0)
    kinds = decoder.config.layer_types
    # Masks of kinds that no layer is of are not used.
    return {kind: _opened(own, spans, cache, kinds.index(kind)) if kind in kinds else own for kind, own in mask.items()}


def _is_causal(decoder: PreTrainedModel) -> bool:
    """Whether attention without a mask is causal; PaliGemma's is not."""
    return all(getattr(layer, "is_causal", True) for layer in decoder.modules() if hasattr(layer, "layer_idx"))


def _opened(mask: Tensor | BlockMask | None, spans: Spans, cache: Cache | None, layer: int) -> Tensor | BlockMask:
    """A layer's mask, opened; None is plain causal."""
    length = spans.query.shape[1]
    keys, offset = (length, 0) if cache is None else cache.get_mask_sizes(length, layer)
    first = (0 if cache is None else int(cache.get_seq_length())) - offset  # column of the forward's first token
    if isinstance(mask, BlockMask):
        both = or_masks(mask.mask_mod, spans.overlay(first))
        batch = len(spans.query)
        return create_block_mask(both, batch, None, *mask.seq_lengths, device=spans.query.device)
    if mask is None:
        columns = torch.arange(keys, device=spans.query.device)
        mask = (columns <= columns[first : first + length, None])[None, None]
    opened = F.pad(spans.opened, (first, mask.shape[-1] - first - length))[:, None]  # [B, 1, L, K]
    return mask | opened if mask.dtype == torch.bool else mask.masked_fill(opened, 0)


def _refuse_packed(decoder: PreTrainedModel, given: dict[str, Any]) -> None:
    """Several sequences in one row are told by positions that begin anew, where there is neither mask nor cache."""
    positions, use_cache = given.get("position_ids"), given.get("use_cache")
    caches = cache_of(given) is not None or (decoder.config.use_cache if use_cache is None else use_cache)
    if positions is None or given.get("attention_mask") is not None or caches:
        return
    positions = positions[0] if positions.shape[0] == 4 and positions.ndim == 3 else positions
    if positions.ndim == 2 and find_packed_sequence_indices(positions) is not None:
        raise ValueError(
            f"position_ids with gaps and no attention_mask mean several sequences in one row, which {_NAME} does not "
            "tell apart; give attention_mask, with one sequence in a row"
        )


def _check_implementation(decoder: PreTrainedModel) -> None:
    if (name := base_implementation(decoder)) not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={name!r} takes no mask in which images see later text; call "
            f"model.set_attn_implementation(…) with one of {', '.join(IMPLEMENTATIONS)} first"
        )


@dataclass(frozen=True)
class MutualAttention:
    """Settings of :func:`modality_mutual_attention`, which documents them."""

    stop_token_ids: tuple[int, ...] | None
    scope: Scope
    frame_token_ids: frozenset[int] | None

    def spans(
        self, model: PreTrainedModel, input_ids: Tensor, mask: Any = None, *, offset: int = 0, end: int | None = None
    ) -> Spans:
        """Which text each image of a batch sees; arguments as of `find_layout` and :func:`find_spans`."""
        layout = find_layout(model, input_ids, mask, offset=offset, frame_token_ids=self.frame_token_ids)
        return find_spans(layout, find_stops(input_ids, self.stop_token_ids), scope=self.scope, end=end)


def _settings(
    model: PreTrainedModel,
    *,
    stop_token_id: int | Collection[int] | None = None,
    scope: Scope = "segment",
    frame_token_ids: Collection[int] | None = None,
) -> MutualAttention:
    """Modality-mutual attention (MMA): image tokens attend to the question that follows them.

    The whole of a prompt has to be in one call: an image's keys and values depend on the question, so that a cache that
    ends between the two is of no use.

    Args:
        model: A vision-language model of a supported family with an attention implementation of `eager`, `sdpa` or
            `flex_attention`.
        stop_token_id: Marker that ends a question, such as that of the assistant's turn; or several. Images see the
            text up to it, itself included, and none without one behind. By default that of the model's configuration
            (AKI). Where there is none, they see the text up to the end of the prompt, that is of what `generate` or
            the first forward is given.
        scope: "segment": the text between an image and the next one, as the authors' code has it for one image.
            "question": all text of the same turn, behind later images too. "all": the paper's general form, where all
            text and all images of a prompt see each other; not for training.
        frame_token_ids: As of :func:`multimodal.layout.find_layout`.

    Raises:
        TypeError: For a model of no supported family, or one that was compiled.
        ValueError: For wrong options, or an attention implementation that takes no such mask (FlashAttention). On a
            forward or `generate`: for a prompt without images, a prompt that is given in parts, or labels on text that
            images see.
    """
    family_of(model)
    _check_implementation(model.get_decoder())
    check_scope(scope)
    if stop_token_id is None:
        stop_token_id = getattr(model.config, "stop_token_id", None)
    frames = None if frame_token_ids is None else frozenset(frame_token_ids)
    return MutualAttention(as_stop_ids(stop_token_id), scope, frames)


class Found(NamedTuple):
    """What is known before a forward of a model under the switch.

    Attributes:
        spans: Of its tokens; None where none of them can see a later one.
        waits: Rows with an image whose question has not ended yet, `[B]` bool.
    """

    spans: Spans | None
    waits: Tensor | None = None


# What images saw when a cache was filled cannot be mended; so of each cache the rows that wait for a question.
_waiting = weakref.WeakKeyDictionary[Cache, Tensor]()
_prompt = ContextVar[tuple[PreTrainedModel, int] | None](
    "model that generates, and where its prompt ends", default=None
)


def _look(model: PreTrainedModel, given: dict[str, Any]) -> Found | None:
    """Before a model's forward: what its images see."""
    if (settings := modality_mutual_attention.active(model)) is None:
        return None
    ids, prompt = _ids_of(given), _prompt.get()
    found = look(model, settings, ids, given, prompt[1] if prompt is not None and prompt[0] is model else None)
    cache = cache_of(given)
    if found.spans is not None and (cache is None or not int(cache.get_seq_length())):
        _refuse_text_alone(model, ids)
    return found


def look(
    model: PreTrainedModel, settings: MutualAttention, ids: Tensor, given: dict[str, Any], end: int | None = None
) -> Found:
    """Before a forward: what its images see.

    Args:
        model: The model.
        settings: What is to be seen.
        ids: Of the forward's tokens, `[B, L]`.
        given: Its arguments by name.
        end: Text from here on is answer, counted from the first token in the cache.

    Raises:
        ValueError: For the end of a question whose image is in the cache, or labels on text that images see.
    """
    cache = cache_of(given)
    if cache is not None and ids.shape[1] == 1:  # a step of decoding
        return Found(None)
    first = 0 if cache is None else int(cache.get_seq_length())
    end = None if end is None else max(end - first, 0)
    spans = settings.spans(model, ids, given.get("attention_mask"), offset=first, end=end)
    waits = _rows_that_wait(model, settings, ids, spans)
    if first and cache is not None and (before := _waiting.get(cache)) is not None:
        _refuse_late_question(settings, ids[:, :end], before)
        waits = waits | before if waits.shape == before.shape else waits
    refuse_leaks(spans, given.get("labels"))
    return Found(spans, waits)


def remember(cache: Cache | None, found: Found) -> None:
    """After a forward: which rows of its cache still wait for a question."""
    if cache is not None and found.waits is not None:
        _waiting[cache] = found.waits


def _ids_of(given: dict[str, Any]) -> Tensor:
    if (ids := given.get("input_ids")) is None:
        raise ValueError(f"{_NAME} finds image tokens by their ids; give input_ids, not inputs_embeds alone")
    return ids


def _refuse_text_alone(model: PreTrainedModel, ids: Tensor) -> None:
    if not (ids == family_of(model).image_token_id(model)).any():
        raise ValueError(
            f"no image token is in input_ids, so {_NAME} has nothing to open; leave the switch for text alone, and "
            "give a prompt with images in one piece"
        )


def _rows_that_wait(model: PreTrainedModel, settings: MutualAttention, ids: Tensor, spans: Spans) -> Tensor:
    image = ids == family_of(model).image_token_id(model)
    if settings.stop_token_ids is not None:
        return (image & (spans.query < 0)).any(1)
    return (image & ~spans.opened.any(2)).any(1)


def _refuse_late_question(settings: MutualAttention, ids: Tensor, waits: Tensor) -> None:
    """Refuses the second part of a prompt whose first one ended between an image and its question."""
    stops = find_stops(ids, settings.stop_token_ids)
    late = torch.full_like(ids[:, 0], ids.shape[1] > 1).bool() if stops is None else stops.any(1)
    if (late & waits).any() if late.shape == waits.shape else late.any() and waits.any():
        raise ValueError(_in_parts("the cache holds an image whose question comes only now"))


def _in_parts(what: str) -> str:
    return (
        f"{what}, but under {_NAME} what is kept of an image depends on its question; give a prompt in one piece "
        "(prefill_chunk_size=None), and begin with an empty cache for another question"
    )


def _begin(decoder: PreTrainedModel, given: dict[str, Any], found: Found) -> dict[str, Any]:
    """Before the decoder's forward: opens its mask."""
    if found.spans is None:
        return given
    return {**given, "attention_mask": open_mask(decoder, given, found.spans)}


def _finish(output: Any, found: Found) -> None:
    """After a model's forward: remembers of its cache what it lacks."""
    remember(cache_of(output) if isinstance(output, ModelOutput) else None, found)


def _around_generate(model: PreTrainedModel, call: Callable[..., Any], given: dict[str, Any]) -> Any:
    """`generate`, whose images see the prompt and none of the text that is generated."""
    if (settings := modality_mutual_attention.active(model)) is None:
        return call(**given)
    ids, mask, cache = given.get("inputs"), given.get("attention_mask"), cache_of(given)
    ids = _ids_of(given) if ids is None else ids
    config = given.get("generation_config") or model.generation_config
    if given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
        raise ValueError(_in_parts("prefill_chunk_size asks for a prompt in parts"))
    end = ids.shape[1] if mask is None else max(ids.shape[1], mask.shape[-1])
    if end == ids.shape[1]:  # else it is the rest of a prompt whose beginning is in the cache
        _check_prompt(settings.spans(model, ids, mask), ids == family_of(model).image_token_id(model), cache)
    token = _prompt.set((model, end))
    try:
        return call(**given)
    finally:
        _prompt.reset(token)


def _check_prompt(spans: Spans, image: Tensor, cache: Cache | None) -> None:
    opened = spans.opened
    blind = image.any(1) & ~opened.any((1, 2))
    if blind.any():
        raise ValueError(
            f"images of rows {blind.nonzero()[:, 0].tolist()} see no text under {_NAME}: they need text behind them "
            "and, where stop_token_id is given, a marker that ends it; see whether the prompt has it, as "
            "processor.apply_chat_template(…, add_generation_prompt=True) makes it"
        )
    held = 0 if cache is None else int(cache.get_seq_length())
    if opened[:, :held, held:].any():
        raise ValueError(_in_parts("the cache ends between an image and its question"))


def _attach(model: PreTrainedModel) -> list[Callable[[], None]]:
    return [_handover.attach(model), around_generate(model, _around_generate)]


modality_mutual_attention = Switch(_NAME, settings=_settings, attach=_attach)
_handover = Handover(
    _NAME, _look, _begin, lambda model: modality_mutual_attention.active(model) is not None, finish=_finish
)
