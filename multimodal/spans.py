"""Which text each image of a prompt sees under modality-mutual attention, and the mask that follows from it.

Tensors alone; :mod:`multimodal.mma` has the paper, and puts the mask into models of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .layout import VisualLayout

__all__ = ["Scope", "Spans", "as_stop_ids", "check_scope", "find_spans", "find_stops", "mutual_mask", "refuse_leaks"]

Scope = Literal["segment", "question", "all"]


@dataclass(frozen=True)
class Spans:
    """What a mask is opened for: token i also sees a later token j where `query[:, i] == key[:, j]`.

    Attributes:
        query: Number of the span that a token looks into, -1 for none, `[B, L]` int64.
        key: Number of the span that a token lies in, -2 for none, `[B, L]` int64.
    """

    query: Tensor
    key: Tensor

    @property
    def opened(self) -> Tensor:
        """The pairs that are seen though the key comes later, `[B, L, L]` bool."""
        pairs = self.query[:, :, None] == self.key[:, None, :]
        return pairs & torch.ones_like(pairs[0]).triu(1)

    def to(self, device: torch.device) -> Spans:
        """The same on another device."""
        return Spans(self.query.to(device), self.key.to(device))

    def overlay(self, first: int) -> Callable[..., Tensor]:
        """:attr:`opened` as a function of batch, head, query and key index, for tokens that begin at `first`."""
        length, last = self.query.shape[1], self.query.shape[1] - 1

        def opened(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            q, k = query, key - first
            inside = (k > q) & (k < length)
            return inside & (self.query[batch, q.clamp(0, last)] == self.key[batch, k.clamp(0, last)])

        return opened


def find_spans(
    layout: VisualLayout, stops: Tensor | None = None, *, scope: Scope = "segment", end: int | None = None
) -> Spans:
    """Which text each image sees.

    Args:
        layout: Of the sequences.
        stops: Markers that end a question, `[B, L]` bool. An image sees no text without a marker behind it. Without
            `stops` questions end with the sequence, or at `end`.
        scope: "segment": the text between an image and the next one, up to the first marker, that included. Images next
            to each other share what follows. "question": all text up to the first marker, behind later images too.
            "all": the paper's general form, where all text and all images see each other; `stops` are not looked at.
        end: Text from here on is answer, which no image sees.
    """
    text = layout.text
    before_end = text if end is None else text & (torch.arange(text.shape[1], device=text.device) < end)
    if scope == "all":
        outside = torch.where(text, 1, -1)
        return Spans(
            query=torch.where(layout.image, 0, outside),
            key=torch.where(before_end, 0, torch.where(layout.image, 1, -2)),
        )
    marks = torch.zeros_like(text) if stops is None else stops & before_end
    turn = marks.cumsum(1) - marks.long()  # markers before: a marker belongs to the question that it ends
    # Of an image the count of text before it, which images next to each other have in common; of text its image's.
    segment = torch.where(layout.image, text.cumsum(1), -1).cummax(1).values
    span = turn if scope == "question" else turn * (text.shape[1] + 1) + segment + 1
    looks = layout.image if stops is None else layout.image & (turn < marks.sum(1, keepdim=True))
    return Spans(query=torch.where(looks, span, -1), key=torch.where(before_end, span, -2))


def mutual_mask(
    input_ids: Tensor,
    *,
    image_token_id: int,
    tokens_per_image: int,
    stop_token_id: int | Collection[int] | None,
    attention_mask: Tensor | None = None,
    scope: Scope = "segment",
) -> Tensor:
    """The mask of modality-mutual attention by itself, for networks that are not of transformers.

    Args:
        input_ids: `[B, N]` int, with one id for each image.
        image_token_id: That id.
        tokens_per_image: How many image tokens take its place. Give 1 where the ids are repeated already.
        stop_token_id: Marker, or markers, that end a question; None where it ends with the sequence.
        attention_mask: `[B, N]`, 0 at padding.
        scope: As of :func:`find_spans`.

    Returns:
        `[B, 1, L, L]` bool, True where query (second to last) attends to key. Rows that are shorter for having fewer
        images are padded: on the left where some row was so, else on the right. Rows of padding may see nothing.

    Raises:
        ValueError: For shapes that do not fit, no tokens for an image, or an unknown scope.
    """
    check_scope(scope)
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, length]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids {tuple(input_ids.shape)}; "
            "they must be the same"
        )
    if tokens_per_image < 1:
        raise ValueError(f"tokens_per_image={tokens_per_image} must be at least 1")
    ids, valid = _expanded(input_ids, image_token_id, tokens_per_image, attention_mask)
    image = (ids == image_token_id) & valid
    layout = VisualLayout(image, torch.where(image, 0, -1), torch.zeros_like(image), valid)
    spans = find_spans(layout, find_stops(ids, as_stop_ids(stop_token_id)), scope=scope)
    causal = torch.ones_like(spans.opened[0]).tril()
    return ((causal | spans.opened) & valid[:, None, :])[:, None]


def _expanded(ids: Tensor, image_id: int, count: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids with the image's repeated, and what is not padding, both `[B, L]`."""
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    repeats = torch.where((ids == image_id) & valid, count, 1)
    side = "left" if bool((~valid[:, 0]).any()) else "right"

    def grow(rows: Tensor) -> Tensor:
        grown = [row.repeat_interleave(times) for row, times in zip(rows, repeats, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(grown, batch_first=True, padding_side=side)

    return grow(ids), grow(valid)


def as_stop_ids(stop_token_id: int | Collection[int] | None) -> tuple[int, ...] | None:
    """Ids of markers that end a question, of one or several; None stays.

    Raises:
        ValueError: For what is no id, or none at all.
    """
    if stop_token_id is None:
        return None
    ids = (stop_token_id,) if isinstance(stop_token_id, int) else tuple(stop_token_id)
    if not ids or not all(isinstance(one, int) and one >= 0 for one in ids):
        raise ValueError(
            f"stop_token_id={stop_token_id!r} must be the id of the marker that ends a question, several ids, or None; "
            "tokenizer.convert_tokens_to_ids gives it"
        )
    return ids


def find_stops(input_ids: Tensor, stop_ids: tuple[int, ...] | None) -> Tensor | None:
    """Where markers are, as `input_ids`, bool; None where there are none to look for."""
    if stop_ids is None:
        return None
    return torch.isin(input_ids, torch.tensor(stop_ids, dtype=input_ids.dtype, device=input_ids.device))


def check_scope(scope: str) -> None:
    """Raises ValueError for a scope that is none of `Scope`."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} must be one of {', '.join(map(repr, get_args(Scope)))}")


def refuse_leaks(spans: Spans, labels: Tensor | None) -> None:
    """Refuses labels on tokens that an image before them has seen, whose prediction would be read off there.

    Args:
        spans: Of the sequences.
        labels: `[B, L]`, -100 where nothing is to be predicted.

    Raises:
        ValueError: Where there are such labels.
    """
    if labels is None:
        return
    seen = spans.opened.any(1)  # by an earlier token, [B, L]
    if labels.shape != seen.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}; for these input_ids it must be {tuple(seen.shape)}")
    leaks = seen & (labels.to(seen.device) != -100)
    if leaks.any():
        row, column = leaks.nonzero()[0].tolist()
        raise ValueError(
            f"{int(leaks.sum())} labels, the first at [{row}, {column}], stand on text that images see under "
            "modality-mutual attention, from which it would be read instead of learnt; set labels to -100 "
            "up to the answer, and give stop_token_id=…, the marker before the answer"
        )
