"""Scanpaths from a model: drawn at random, or the most likely step each time.

Each fixation costs one pass of one token: keys and values of what came before are kept. A scanpath ends when the model
points at the end, at the latest after a maximum of fixations.

Report samples. The most likely step is often "stay", and a greedy scanpath may never leave the centre: that is no
prediction of what people do. `max_refixations` and `temperature` change the model's distribution; leave them out where
likelihoods are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vision.scanpath.model import OAT, EncodedScenes
from vision.scanpath.scenes import PAD, Scenes

__all__ = ["Decoded", "StepDecoder", "greedy", "sample"]


@dataclass(frozen=True)
class Decoded:
    """Scanpaths of a batch of scenes.

    Attributes:
        objects: `[B, S, T]`, int64, S scanpaths of each scene, padded with `PAD`; T is the longest one's length.
        ended: `[B, S]`, whether the model ended the search, and not the maximum length.
    """

    objects: Tensor
    ended: Tensor

    @property
    def lengths(self) -> Tensor:
        """`[B, S]`, at least 1."""
        return (self.objects != PAD).sum(-1)

    def tolist(self) -> list[list[np.ndarray]]:
        """Scene by scene, the objects of each scanpath, `[T]`, as the metrics take them."""
        paths, lengths = self.objects.cpu().numpy(), self.lengths.tolist()
        return [[path[:n] for path, n in zip(*scene, strict=True)] for scene in zip(paths, lengths, strict=True)]


def sample(
    model: OAT,
    scenes: Scenes,
    num_samples: int = 1,
    *,
    temperature: float = 1.0,
    max_length: int | None = None,
    max_refixations: int | None = None,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Scanpaths drawn from the model's distribution.

    Args:
        model: put into evaluation mode for the time.
        scenes: on the model's device.
        num_samples: S, scanpaths of each scene; they share what is computed of the scene.
        temperature: divides the logits; below 1 for likelier scanpaths, above for more varied ones.
        max_length: most fixations of a scanpath; None for the model's.
        max_refixations: how often an object may be fixated again, at once or later; 0 for never, None for any number.
            Where no object is left, the search ends.
        generator: of random numbers, on the model's device; None for torch's own.

    Returns:
        `num_samples` of each scene. The same generator state gives the same ones.

    Raises:
        ValueError: options out of their range, and what `OAT.encode` refuses.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be positive and finite; the limit of 0 is `greedy`.")

    def draw(logits: Tensor) -> Tensor:
        chances = (logits.float() / temperature).softmax(-1)
        return torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(chances.shape[:2])

    return _decode(model, scenes, num_samples, draw, max_length, max_refixations)


def greedy(model: OAT, scenes: Scenes, *, max_length: int | None = None, max_refixations: int | None = None) -> Decoded:
    """The scanpath of the likeliest step each time, which is not the likeliest scanpath.

    Args:
        model: put into evaluation mode for the time.
        scenes: on the model's device.
        max_length: see `sample`.
        max_refixations: see `sample`; without a limit a model may stay on one object up to the maximum length.

    Returns:
        One of each scene, S = 1.

    Raises:
        ValueError: as `sample`.
    """
    return _decode(model, scenes, 1, lambda logits: logits.argmax(-1), max_length, max_refixations)


@torch.no_grad()
def _decode(
    model: OAT,
    scenes: Scenes,
    num_samples: int,
    choose: Callable[[Tensor], Tensor],
    max_length: int | None,
    max_refixations: int | None,
) -> Decoded:
    max_length = model.config.max_length if max_length is None else max_length
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("max_length", max_length, 1),
        ("max_refixations", 0 if max_refixations is None else max_refixations, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    was_training = model.training
    model.eval()
    try:
        decoder = StepDecoder(model, model.encode(scenes), num_samples, max_length)
        end = decoder.end
        visits = torch.zeros(len(scenes), num_samples, end + 1, device=scenes.targets.device)
        ended = torch.zeros(visits.shape[:2], dtype=torch.bool, device=visits.device)
        path: list[Tensor] = []
        last = None
        while len(path) < max_length and not ended.all():
            logits = decoder.step(last)
            if max_refixations is not None:
                logits[visits > max_refixations] = -torch.inf
            last = choose(logits).masked_fill(ended, end)  # [B, S]
            ended = last == end
            path.append(last.masked_fill(ended, PAD))
            visits[..., :end].scatter_add_(2, last.clamp(max=end - 1)[..., None], (~ended)[..., None].to(visits.dtype))
    finally:
        model.train(was_training)
    objects = torch.stack(path, -1)
    longest = int((objects != PAD).sum(-1).max())  # the last step may have been nothing but ends
    return Decoded(objects[..., :longest], ended)


class StepDecoder:
    """The decoder of a model, step by step, for several scanpaths of each scene at once.

    Computes what `OAT.decode` does, of the same layers, but of the newest token alone. Scanpaths of a scene are rows of
    one query, so that the scene's keys and values are there once, however many scanpaths there are.

    Args:
        model: in evaluation mode; there is no dropout here.
        encoded: B scenes.
        num_samples: S, scanpaths of each.
        max_length: steps that there is room for.
    """

    def __init__(self, model: OAT, encoded: EncodedScenes, num_samples: int, max_length: int) -> None:
        self._model, self._encoded, self._samples = model, encoded, num_samples
        self._time = model.time(max_length, encoded.memory.device)
        self._padding = encoded.padding[:, None]  # [B, 1, N + 1]
        self._pointer_keys = model.pointer.keys(encoded.memory)
        self._layers = [cast(nn.TransformerDecoderLayer, layer) for layer in model.decoder.layers]
        self._past = [_PastAttention(layer.self_attn, max_length) for layer in self._layers]
        self._scene = [_SceneAttention(layer.multihead_attn, encoded) for layer in self._layers]
        self._steps = 0

    @property
    def end(self) -> int:
        """What stands for the end of search, N."""
        return self._padding.shape[-1] - 1

    def step(self, fixated: Tensor | None) -> Tensor:
        """What comes next.

        Args:
            fixated: the newest fixation of each scanpath, `[B, S]`, from 0 to N; None at the start. What follows an end
                means nothing.

        Returns:
            Logits `[B, S, N + 1]`, as a row of `OAT.forward`.
        """
        batch = len(self._padding)
        if fixated is None:
            start = self._encoded.tokens.shape[1] - 1
            fixated = torch.full((batch, self._samples), start, device=self._padding.device)
        rows = fixated[..., None].expand(-1, -1, self._encoded.tokens.shape[-1])
        x = self._encoded.tokens.gather(1, rows)
        x = x + self._time[self._steps].to(x.dtype)  # [B, S, C]
        for layer, past, scene in zip(self._layers, self._past, self._scene, strict=True):
            x = layer.norm1(x + past(x))
            x = layer.norm2(x + scene(x))
            x = layer.norm3(x + layer.linear2(layer.activation(layer.linear1(x))))
        logits = self._model.pointer(x, self._pointer_keys).masked_fill(self._padding, -torch.inf)
        if not self._steps:
            logits[..., -1] = -torch.inf
        self._steps += 1
        return logits


class _PastAttention:
    """Self-attention of the newest token of each scanpath to itself and those before it."""

    def __init__(self, attention: nn.MultiheadAttention, max_length: int) -> None:
        self._attention, self._max_length = attention, max_length
        self._past: Tensor | None = None
        self._length = 0

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, S, C]` → the same shape."""
        query, *new = _projected(self._attention, x.flatten(0, 1)[:, None], 0, 3)  # [B S, h, 1, d] each
        if self._past is None:  # not before, for autocast decides on the dtype
            batch, heads, _, head_dim = query.shape
            self._past = query.new_empty(2, batch, heads, self._max_length, head_dim)
        self._past[..., self._length, :] = torch.stack(new).squeeze(-2)
        self._length += 1
        keys, values = self._past[..., : self._length, :]
        y = F.scaled_dot_product_attention(query, keys, values)
        return self._attention.out_proj(y.flatten(1)).view(x.shape)


class _SceneAttention:
    """Cross-attention of the newest tokens of all scanpaths of a scene to its objects."""

    def __init__(self, attention: nn.MultiheadAttention, encoded: EncodedScenes) -> None:
        self._attention = attention
        self._keys, self._values = _projected(attention, encoded.memory, 1, 3)  # [B, h, N + 1, d]
        self._mask = ~encoded.padding[:, None, None]  # [B, 1, 1, N + 1]

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, S, C]` → the same shape."""
        (query,) = _projected(self._attention, x, 0, 1)  # [B, h, S, d]
        y = F.scaled_dot_product_attention(query, self._keys, self._values, attn_mask=self._mask)
        return self._attention.out_proj(y.transpose(1, 2).flatten(2))


def _projected(attention: nn.MultiheadAttention, x: Tensor, first: int, stop: int) -> list[Tensor]:
    """`[B, N, C]` → of the queries, keys and values those from `first` to before `stop`, `[B, h, N, d]` each."""
    rows = slice(first * attention.embed_dim, stop * attention.embed_dim)
    y = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    parts = y.unflatten(-1, (stop - first, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    return list(parts)
