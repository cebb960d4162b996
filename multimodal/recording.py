"""What the tokens of an answer read of the images, noted while `generate` runs; for :mod:`multimodal.explain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .attention import Call, check_implementation, hand_down, interpose
from .hooks import Handover
from .layout import VisualLayout, cache_of, family_of, find_layout
from .switches import Switch
from .vmtc import Picture, compress_visual_tokens

__all__ = ["LastRows", "Rolled", "recording"]

_NAME = "the record of attention"


class LastRows:
    """Notes what the last token of each forward reads of the images: a listener of a decoder's layers."""

    def __init__(self, layers: tuple[int, ...], heads: tuple[int, ...]) -> None:
        self.layers, self.heads = layers, torch.tensor(heads)
        self.image = torch.zeros(0, dtype=torch.long)  # positions of the image tokens that the decoder sees
        self.shares = torch.zeros(0, 0)  # `[N', N]`, from these to all of the prompt
        self.steps: list[dict[int, Tensor]] = []

    def begin(self, model: PreTrainedModel, layout: VisualLayout, first: int) -> None:
        """A forward begins."""
        if first == 0:
            self.image = layout.image[0].nonzero()[:, 0]
            self.shares = _shares(model, len(self.image))
        self.steps.append({})

    def wanted(self, call: Call) -> Tensor:
        last = call.query.shape[2] - 1
        return torch.arange(last, last + (call.layer in self.layers), device=call.query.device)

    def hear(self, call: Call, rows: Tensor, weights: Tensor) -> None:
        columns, outside = call.columns(self.image.to(weights.device))
        reads = weights[0, self.heads.to(weights.device), 0][:, columns]  # [h, N' - outside]
        self.steps[-1][call.layer] = F.pad(reads, (outside, 0)).float().cpu()

    def weights(self) -> Tensor:
        """`[T, l, h, N']`."""
        self._check_heard(self.steps[0])
        return torch.stack([torch.stack([step[layer] for layer in self.layers]) for step in self.steps])

    def _check_heard(self, heard: Mapping[int, Any]) -> None:
        if missing := set(self.layers) - heard.keys():
            raise RuntimeError(
                f"layers {sorted(missing)} told nothing of their attention: they do not hand keyword arguments down to "
                "it, or their attention implementation was changed meanwhile"
            )


class Rolled(LastRows):
    """Rolls attention out through the layers: what of each image token reaches each token."""

    def __init__(self, layers: tuple[int, ...], heads: tuple[int, ...]) -> None:
        super().__init__(layers, heads)
        self.reached: dict[int, Tensor] = {}  # by layer, -1 for the embeddings, of all tokens so far `[L, N']`

    def wanted(self, call: Call) -> Tensor:
        return torch.arange(call.query.shape[2] if call.layer in self.layers else 0, device=call.query.device)

    def hear(self, call: Call, rows: Tensor, weights: Tensor) -> None:
        before = self.layers.index(call.layer) - 1
        length = call.first + call.query.shape[2]
        if before < 0:
            embedded = torch.arange(length, device=weights.device)[:, None] == self.image.to(weights.device)
            self.reached[-1] = embedded.float()
        below = self.reached[self.layers[before] if before >= 0 else -1]
        mean = weights[0, self.heads.to(weights.device)].mean(0).float()  # [t, K]
        keys = below[call.key_offset :].to(mean.device)  # a static cache has more, which nothing reads
        here = self.reached.get(call.layer, below[:0])
        if len(here) < length:
            here = self.reached[call.layer] = F.pad(here, (0, 0, 0, length - len(here)))
        own = rows + call.first
        here[own] = ((mean[:, : len(keys)] @ keys + below[own]) / 2).to(here.device)

    def weights(self) -> Tensor:
        self._check_heard(self.reached)
        return self.reached[self.layers[-1]][-len(self.steps) :, None, None].cpu()


def _shares(model: PreTrainedModel, seen: int) -> Tensor:
    """To which of the prompt's image tokens what the decoder's got belongs, `[N', N]`; rows sum to 1."""
    settings = compress_visual_tokens.active(model)
    if settings is None or settings.last is None:
        return torch.eye(seen)
    return torch.block_diag(*map(_members, settings.last.pictures))


def _members(picture: Picture) -> Tensor:
    """Shares of a compressed picture's tokens in those that were left of it, `[K, N]`."""
    index, target = picture.index.cpu(), picture.target.cpu()
    mine = (index[:, None] == target).float()
    shares = mine * picture.scores.float().cpu()
    shares = torch.where(shares.sum(1, keepdim=True) > 0, shares, mine)  # as they are merged
    return shares / shares.sum(1, keepdim=True)


class _Found(NamedTuple):
    """What is known before a forward that is recorded."""

    model: PreTrainedModel
    record: LastRows
    layout: VisualLayout
    first: int


def _find(model: PreTrainedModel, given: dict[str, Any]) -> _Found | None:
    if (record := recording.active(model)) is None:
        return None
    cache = cache_of(given)
    first = 0 if cache is None else int(cache.get_seq_length())
    layout = find_layout(model, given["input_ids"], given.get("attention_mask"), offset=first)
    return _Found(model, record, layout, first)


def _begin(decoder: PreTrainedModel, given: dict[str, Any], found: _Found) -> dict[str, Any]:
    found.record.begin(found.model, found.layout, found.first)
    return hand_down(given, first=found.first, listener=found.record)


def _settings(model: PreTrainedModel, record: LastRows) -> LastRows:
    family_of(model)
    check_implementation(model.get_decoder())
    return record


def _attach(model: PreTrainedModel) -> list[Callable[[], None]]:
    return [interpose(model.get_decoder()), _handover.attach(model)]


recording = Switch(_NAME, settings=_settings, attach=_attach)
_handover = Handover(_NAME, _find, _begin, lambda model: recording.active(model) is not None)
