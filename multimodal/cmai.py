"""CMAI: each text token reads only the image tokens that matter to it.

The method is that of Yang et al., "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing
Image Redundancy" (2024), https://arxiv.org/abs/2411.15453. No code was released. The abstract says that text-to-image
attention is aggregated by text-to-text attention into a focus score, and that text-image pairs with a low score are
inhibited. The form used here is a reconstruction:

    A = softmax(Q K^T / sqrt(d) + mask)                                      of each layer and head
    F = A_tt A_ti                                                            focus score of text token i, image token m
    output = softmax(Q K^T / sqrt(d) + mask - penalty where F is low) V      of text rows; image rows stay as they are

Where to cut, in which layers, and what is stored are arguments of :func:`inhibit_cross_modality`; defaults are ours.

In generation each new token needs what all text tokens before it read of the images. That rides in the key-value cache
as one more layer, so that it is reordered with beams, cropped, repeated and copied as the cache is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticSlidingWindowLayer
from transformers.utils import ModelOutput

from .attention import Call, Reweighed, check_implementation, hand_down, handed_down, interpose, uncompiled
from .hooks import Handover
from .layout import VisualLayout, cache_of, family_of, find_layout
from .switches import Switch
from .text_reads import TextReads, Tokens

__all__ = ["Inhibition", "focus_score", "inhibit_cross_modality", "keep_focused"]

ThresholdOf = Literal["absolute", "maximum", "uniform"]
Source = Literal["same", "previous"]
Store = Literal["head_mean", "per_head"]

_NAME = "cross-modality attention inhibition"
_ROUNDING = 1e-4  # of keep_ratio times a count, so that 0.1 of 30 tokens are 3


def focus_score(text_to_text: Tensor, text_to_image: Tensor, *, renormalise: bool = False) -> Tensor:
    """Text-to-image attention, aggregated by text-to-text attention: `F = A_tt A_ti`.

    A token's own reading of the image takes part through the diagonal of `text_to_text`.

    Args:
        text_to_text: Attention of text tokens to text tokens, `[..., t, T]`: of some, or all, of the `T`.
        text_to_image: Attention of all text tokens to image tokens, `[..., T, N]`.
        renormalise: Scale the rows of both to sum 1 first; rows of zeros stay zero.

    Returns:
        `[..., t, N]`.
    """
    if renormalise:
        text_to_text, text_to_image = _normalised(text_to_text), _normalised(text_to_image)
    return text_to_text @ text_to_image


def keep_focused(
    focus: Tensor,
    visible: Tensor,
    *,
    keep_ratio: float = 0.5,
    threshold: float | None = None,
    threshold_of: ThresholdOf = "absolute",
) -> Tensor:
    """Which text-image pairs stay: in each row the highest scores, as far as they reach a threshold.

    Args:
        focus: Scores of text tokens for image tokens, `[..., t, N]`.
        visible: The image tokens that a text token sees at all, bool, of a shape that expands to that of `focus`.
        keep_ratio: `ceil(keep_ratio * n)` pairs stay of a row that sees `n` image tokens.
        threshold: Pairs whose score is lower go too, except a row's best. With `keep_ratio=1` it acts alone.
        threshold_of: What `threshold` is a multiple of: 1 ('absolute'), the row's largest score ('maximum'), or 1 / n
            ('uniform').

    Returns:
        Bool, as `focus`; False where a pair is not visible. A row that sees an image token keeps one at least.
    """
    visible = visible.expand_as(focus)
    count = visible.sum(-1, keepdim=True)  # [..., t, 1]
    kept = torch.ceil(count * keep_ratio - _ROUNDING).clamp(min=1).minimum(count)
    focus = focus.masked_fill(~visible, -torch.inf)
    most = math.ceil(focus.shape[-1] * keep_ratio - _ROUNDING)
    best = focus.topk(max(most, min(focus.shape[-1], 1)), sorted=True)
    order = torch.arange(best.indices.shape[-1], device=focus.device)
    stays = order < kept
    if threshold is not None:
        scale = {"absolute": 1.0, "maximum": best.values[..., :1], "uniform": 1 / count.clamp(min=1)}[threshold_of]
        stays = stays & ((best.values >= threshold * scale) | (order == 0))
    return torch.zeros_like(visible).scatter(-1, best.indices, stays)


@dataclass(frozen=True)
class Inhibition:
    """Settings of :func:`inhibit_cross_modality`, which documents them."""

    layers: frozenset[int]
    keep_ratio: float
    threshold: float | None
    threshold_of: ThresholdOf
    per_head: bool
    penalty: float
    renormalise: bool
    source: Source
    store: Store
    chunk_bytes: int

    @property
    def scored(self) -> frozenset[int]:
        """Layers whose focus scores are needed."""
        return self.layers if self.source == "same" else frozenset(layer - 1 for layer in self.layers)

    def keep(self, focus: Tensor, visible: Tensor) -> Tensor:
        """:func:`keep_focused` under these settings."""
        return keep_focused(
            focus, visible, keep_ratio=self.keep_ratio, threshold=self.threshold, threshold_of=self.threshold_of
        )


@dataclass
class _Pass:
    """One forward under inhibition; called by each layer's attention."""

    settings: Inhibition
    past: TextReads | None
    new: Tokens
    first: int  # tokens before those of this forward
    length: int  # and with them
    stores: bool  # what is read is kept for the next forward
    repeats: bool  # gradient checkpointing may run layers again
    reads: dict[int, Tensor] = field(default_factory=dict)
    focus: dict[int, Tensor] = field(default_factory=dict)  # of layers that decide for the next
    seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tokens = self.new if self.past is None else self.past.tokens.followed_by(self.new)
        every_position = len(self.new.text) == self.length - self.first
        self.every_row = every_position and bool(self.new.is_text.all())

    def __call__(self, call: Call) -> Iterator[Reweighed] | None:
        """The new weights of the text rows of a layer, in chunks; None for a layer that is not inhibited."""
        self.seen.add(call.layer)
        pieces = self._pieces(call, self.new.to(call.query.device), self.tokens.to(call.query.device))
        if call.layer in self.settings.layers:
            return pieces
        for _ in pieces if call.layer in self.settings.scored else ():  # for its focus scores alone
            pass
        return None

    def _pieces(self, call: Call, new: Tokens, tokens: Tokens) -> Iterator[Reweighed]:
        settings, layer, focus = self.settings, call.layer, []
        chunks = call.row_chunks(torch.arange(len(new.text), device=call.query.device), settings.chunk_bytes)
        # A row needs what all others read, also later ones where a prompt is seen in both directions. So the scores of
        # several chunks are computed twice rather than kept; those of a single one are kept.
        attend = functools.partial(self._attend, call, new, tokens)
        attend = functools.cache(attend) if len(chunks) == 1 else attend
        if layer in settings.scored:
            new_reads = [_read(call, tokens, attend(chunk)[1], settings) for chunk in chunks]
            reads = self._joined(layer, new_reads, call.query)
        for chunk in chunks:
            scores, weights = attend(chunk)
            if layer in settings.scored:
                focus.append(_focus(call, tokens, weights, reads, settings))
            if settings.source == "same":
                scores = _inhibited(call, tokens, scores, focus.pop(), settings)
                weights = scores.softmax(-1)
            elif scores.requires_grad:
                weights = scores.softmax(-1)
            yield Reweighed(new.text[chunk] - self.first, new.is_text[:, chunk], weights)
        if focus:
            self.focus[layer] = torch.cat(focus, 2)
        if not self.repeats:
            self.focus.pop(layer - 1, None)

    def _attend(self, call: Call, new: Tokens, tokens: Tokens, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, and weights without a graph, of some of the new text; inhibited where the layer before decides."""
        scores = call.scores(new.text[chunk] - self.first)  # [B, H, t, K]
        if self.settings.source == "previous" and call.layer in self.settings.layers:
            focus = self.focus[call.layer - 1].to(scores.device)
            scores = _inhibited(call, tokens, scores, focus[:, :, chunk], self.settings)
        return scores, scores.detach().softmax(-1)

    def _joined(self, layer: int, new: list[Tensor], query: Tensor) -> Tensor:
        """What all text reads of all images in a layer, `[B, H or 1, T, N]`."""
        past = None if self.past is None else self.past.reads.get(layer)
        N = len(self.tokens.image)
        if past is not None:  # nothing before an image reads it
            new = [torch.nn.functional.pad(past, (0, N - past.shape[-1])), *new]
        heads = query.shape[1] if self.settings.store == "per_head" else 1
        reads = torch.cat(new, 2) if new else query.new_zeros(query.shape[0], heads, 0, N)
        if self.stores:
            self.reads[layer] = reads
        return reads


@torch.no_grad()
def _read(call: Call, tokens: Tokens, weights: Tensor, settings: Inhibition) -> Tensor:
    """What rows read of the images, out of their weights `[B, H, t, K]`: `[B, H or 1, t, N]`."""
    columns, outside = call.columns(tokens.image)
    reads = weights[..., columns] * tokens.is_image[:, None, None, outside:]
    if settings.store == "head_mean":
        reads = reads.mean(1, keepdim=True)
    return torch.nn.functional.pad(reads, (outside, 0)).to(call.query.dtype)


@torch.no_grad()
def _focus(call: Call, tokens: Tokens, weights: Tensor, reads: Tensor, settings: Inhibition) -> Tensor:
    """Focus scores `[B, H or 1, t, N]` of rows with weights `[B, H, t, K]`."""
    columns, outside = call.columns(tokens.text)
    text = weights[..., columns] * tokens.is_text[:, None, None, outside:]  # [B, H, t, T]
    B, H, t, T = text.shape
    # Heads that share what was read are rows of one product, so that it is not repeated.
    text, reads = text.reshape(B, reads.shape[1], -1, T), reads[:, :, outside:].to(text.dtype)
    with torch.autocast(text.device.type, enabled=False):  # half precision would make ties
        focus = focus_score(text, reads, renormalise=settings.renormalise).reshape(B, H, t, -1)
    return focus if settings.per_head else focus.mean(1, keepdim=True)


def _inhibited(call: Call, tokens: Tokens, scores: Tensor, focus: Tensor, settings: Inhibition) -> Tensor:
    """Scores `[B, H, t, K]` of rows with those of unfocused image tokens lowered, by focus `[B, H or 1, t, N]`."""
    columns, outside = call.columns(tokens.image)
    lowest = torch.finfo(scores.dtype).min
    seen = (scores.detach()[:, :1, :, columns] > lowest) & tokens.is_image[:, None, None, outside:]
    unfocused = seen & ~settings.keep(focus[..., outside:], seen)
    where = torch.zeros(*unfocused.shape[:3], scores.shape[-1], dtype=torch.bool, device=scores.device)
    where[..., columns] = unfocused
    return scores.masked_fill(where, lowest) if settings.penalty == math.inf else scores - settings.penalty * where


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


class _Found(NamedTuple):
    """What is known before a forward of a model under the switch."""

    settings: Inhibition
    layout: VisualLayout
    first: int


def _find_images(model: PreTrainedModel, given: dict[str, Any]) -> _Found | None:
    """Before a model's forward: where its image tokens are."""
    if (settings := inhibit_cross_modality.active(model)) is None:
        return None
    if (ids := given.get("input_ids")) is None:
        raise ValueError(f"{_NAME} finds image tokens by their ids; give input_ids, not inputs_embeds alone")
    cache = cache_of(given)
    first = 0 if cache is None else int(cache.get_seq_length())
    layout = find_layout(model, ids, given.get("attention_mask"), offset=first)
    if first == 0 and not layout.image.any():
        raise ValueError(
            f"no image token is in input_ids, so {_NAME} has nothing to inhibit; leave the switch for text alone, "
            "and let the first part of a prompt that is given in parts reach its first image"
        )
    return _Found(settings, layout, first)


def _begin(decoder: PreTrainedModel, given: dict[str, Any], found: _Found) -> dict[str, Any]:
    """Before the decoder's forward: hands it what acts in its layers."""
    cache, use_cache = cache_of(given), given.get("use_cache")
    _refuse_ring_buffers(cache)
    step = _Pass(
        found.settings,
        past=None if found.first == 0 else _past(cache, found.first, found.settings),
        new=Tokens.of(found.layout, found.first),
        first=found.first,
        length=found.first + found.layout.valid.shape[1],
        stores=cache is not None or bool(decoder.config.use_cache if use_cache is None else use_cache),
        repeats=decoder.training,
    )
    return hand_down(given, first=step.first, reweigh=step, every_row=step.every_row)


@uncompiled
def _end(decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
    """After the decoder's forward: what was read goes into its cache."""
    if output is None:  # torch gives no keyword arguments to a hook that another thread takes off at this moment
        return
    between = handed_down(kwargs)
    if between is None or not isinstance(step := between.reweigh, _Pass):
        return
    if missing := (step.settings.layers | step.settings.scored) - step.seen:
        raise RuntimeError(
            f"layers {sorted(missing)} of {type(decoder).__name__} did not ask {_NAME}: the attention implementation "
            "was changed under the switch, or these layers do not hand keyword arguments down to their attention"
        )
    cache = cache_of(kwargs)
    cache = cache_of(output) if cache is None and isinstance(output, ModelOutput) else cache
    if cache is not None:
        TextReads(step.settings, step.tokens, step.length, step.reads).put_into(cache)


def _past(cache: Cache, length: int, settings: Inhibition) -> TextReads:
    side = TextReads.find(cache)
    if side is None or side.length != length:
        raise ValueError(
            f"the cache holds {length} tokens, of which {0 if side is None else side.length} were read under {_NAME}; "
            "begin the prompt under the switch and stay under it, or start with an empty cache"
        )
    if side.settings != settings:
        raise ValueError(
            f"the cache was filled under other settings of {_NAME} ({side.settings}); start with an empty one"
        )
    return side


def _refuse_ring_buffers(cache: Cache | None) -> None:
    if cache is not None and any(isinstance(layer, StaticSlidingWindowLayer) for layer in cache.layers):
        raise ValueError(
            f"a static cache with sliding windows does not keep tokens in order, which {_NAME} needs; use the dynamic "
            "cache, which is the default of generate()"
        )


def _settings(
    model: PreTrainedModel,
    *,
    keep_ratio: float = 0.5,
    threshold: float | None = None,
    threshold_of: ThresholdOf = "absolute",
    layers: Sequence[int] | None = None,
    per_head: bool = True,
    penalty: float = math.inf,
    renormalise: bool = False,
    source: Source = "same",
    store: Store = "head_mean",
    chunk_bytes: int = 64 * 2**20,
) -> Inhibition:
    """Cross-modality attention inhibition (CMAI): each text token reads only the image tokens that matter to it.

    All defaults are ours; the paper's are not known.

    Memory beside the model's own: about five times `chunk_bytes` while a layer runs; and with the key-value cache a
    number for each text and image token in a layer and sample (32 layers, 300 and 576 tokens, float16: 11 MB), times
    the number of heads with `store="per_head"` (0.35 GB).

    Args:
        model: A vision-language model of a supported family with an attention implementation of `eager`, `sdpa` or
            `flex_attention`.
        keep_ratio: Share of the image tokens it sees that a text token goes on reading, in (0, 1]: exactly
            `ceil(keep_ratio * n)` of `n`, in each layer and head.
        threshold: Besides, pairs with a lower focus score are inhibited, except a row's best.
        threshold_of: What `threshold` is a multiple of: 1 ('absolute'), the row's largest score ('maximum'), or 1 / n
            ('uniform').
        layers: Indices of the layers that inhibit; negative ones count from the last. By default all from 2 on, since
            the first two mix the modalities.
        per_head: Each head has its own focus scores; else their mean decides for all heads.
        penalty: What is subtracted from the scores of inhibited pairs. Infinity closes them; `-math.log(gamma)`
            multiplies their weights by `gamma` before these are normalised again.
        renormalise: Scale text-to-text and text-to-image attention to sum 1 in each row before their product.
        source: Whose attention makes the focus scores of a layer: its own before inhibition ('same'), or that of the
            layer before as it was used ('previous'), which saves a softmax.
        store: What is aggregated and kept for later tokens: the text-to-image attention of each head ('per_head'), or
            its mean over heads ('head_mean').
        chunk_bytes: Text rows are treated in chunks whose scores take that many bytes at most.

    Raises:
        TypeError: For a model of no supported family, or one that was compiled.
        ValueError: For wrong options, or an attention implementation without scores (FlashAttention). On a forward: for
            a prompt without images, or a cache that was not filled under the same switch.
    """
    family_of(model)
    decoder = model.get_decoder()
    check_implementation(decoder)
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio} must be above 0 and at most 1, as 0.5 for half of the image tokens")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold} must be a number from 0 on, or None")
    if not penalty > 0:
        raise ValueError(f"penalty={penalty} must be above 0; infinity closes inhibited pairs")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} must be at least 1")
    for name, value, choices in (
        ("threshold_of", threshold_of, ThresholdOf),
        ("source", source, Source),
        ("store", store, Store),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, get_args(choices)))}")
    return Inhibition(
        _layers(layers, decoder.config.num_hidden_layers, source),
        float(keep_ratio),
        threshold,
        threshold_of,
        per_head,
        float(penalty),
        renormalise,
        source,
        store,
        int(chunk_bytes),
    )


def _layers(layers: Sequence[int] | None, count: int, source: Source) -> frozenset[int]:
    """The layers that inhibit, counted from the first."""
    if layers is None:
        if count <= 2:
            raise ValueError(f"by default layers from 2 on inhibit, but there are only {count}; give layers=[…]")
        layers = range(2, count)
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong or not len(layers):
        raise ValueError(f"layers={list(layers)} must be some of 0 to {count - 1}, or of {-count} to -1")
    chosen = frozenset(layer % count for layer in layers)
    if source == "previous" and 0 in chosen:
        raise ValueError("layer 0 has none before it; leave it out of layers, or set source='same'")
    return chosen


def _attach(model: PreTrainedModel) -> list[Callable[[], None]]:
    decoder = model.get_decoder()
    return [interpose(decoder), _handover.attach(model), decoder.register_forward_hook(_end, with_kwargs=True).remove]


inhibit_cross_modality = Switch(_NAME, settings=_settings, attach=_attach)
_handover = Handover(_NAME, _find_images, _begin, lambda model: inhibit_cross_modality.active(model) is not None)
