"""What the text of a sequence read of its images, kept with the key-value cache that the sequence lies in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer

from .layout import VisualLayout

__all__ = ["TextReads", "Tokens"]


@dataclass
class Tokens:
    """The text and image tokens of a batch of sequences: positions that have one in any row, and in which rows.

    Attributes:
        text, image: Ascending positions, `[T]` and `[N]`.
        is_text, is_image: Whether there is one in each row of the batch, `[B, T]` and `[B, N]` bool.
    """

    text: Tensor
    is_text: Tensor
    image: Tensor
    is_image: Tensor

    @classmethod
    def of(cls, layout: VisualLayout, first: int) -> Tokens:
        """Those of a layout whose first token has the position `first`."""
        text, image = layout.text.any(0).nonzero()[:, 0], layout.image.any(0).nonzero()[:, 0]
        return cls(text + first, layout.text[:, text], image + first, layout.image[:, image])

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(self.text.to(device), self.is_text.to(device), self.image.to(device), self.is_image.to(device))

    def followed_by(self, new: Tokens) -> Tokens:
        """These, and those of the tokens that come after."""
        return Tokens(
            torch.cat([self.text, new.text]),
            torch.cat([self.is_text, new.is_text], 1),
            torch.cat([self.image, new.image]),
            torch.cat([self.is_image, new.is_image], 1),
        )


class TextReads(DummyLayer):
    """Text-to-image attention of the tokens in a key-value cache: one more layer of that cache.

    transformers asks all layers of a cache alike to follow what happens to it: beams, crops, copies, a reset.

    Attributes:
        settings: Of the switch under which the tokens were read.
        tokens: Which of the tokens in the cache are text and image.
        length: How many tokens are in the cache.
        reads: By layer, before inhibition: `[B, H or 1, T, N]`.
    """

    def __init__(self, settings: Any, tokens: Tokens, length: int, reads: dict[int, Tensor]) -> None:
        super().__init__()
        self.settings, self.tokens, self.length, self.reads = settings, tokens, length, reads

    @staticmethod
    def find(cache: Cache) -> TextReads | None:
        """The one in a cache."""
        return next((layer for layer in cache.layers if isinstance(layer, TextReads)), None)

    def put_into(self, cache: Cache) -> None:
        """Becomes the last layer of a cache, in place of what it has of this kind."""
        cache.layers[:] = [*(layer for layer in cache.layers if not isinstance(layer, TextReads)), self]

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(read.nbytes for read in self.reads.values())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)
        tokens = self.tokens
        T, N = (int((positions < self.length).sum()) for positions in (tokens.text, tokens.image))
        self.tokens = Tokens(tokens.text[:T], tokens.is_text[:, :T], tokens.image[:N], tokens.is_image[:, :N])
        self.reads = {layer: read[:, :, :T, :N] for layer, read in self.reads.items()}

    def reset(self) -> None:
        self.crop(self.length)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        tokens = self.tokens
        self.tokens = replace(tokens, is_text=change(tokens.is_text), is_image=change(tokens.is_image))
        self.reads = {layer: change(read) for layer, read in self.reads.items()}
