"""Scaled dot-product attention that can be listened to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionMap", "AttentionTap", "attend", "record_attention"]


class AttentionMap(NamedTuple):
    """One layer's attention, kept by `record_attention`."""

    attn: Tensor
    """`[B, heads, Nq, Nk]`, rows sum to 1; still part of the autograd graph."""
    key_grid: tuple[int, int]
    """Height and width of the map of keys, row by row, with padding if there was any: `Nk = height * width`."""
    extent: tuple[float, float]
    """Height and width that the keys cover, in units of the layer's input: above 1 where that was padded."""


class AttentionTap(nn.Module):
    """The place of an attention operator where its map can be had; has no parameters and costs nothing while closed."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[AttentionMap] | None = None

    def forward(self, attn: Tensor, key_grid: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Keeps `attn` if the tap is open; returns it unchanged."""
        if self.kept is not None:
            self.kept.append(AttentionMap(attn, key_grid, extent))
        return attn

    @property
    def is_open(self) -> bool:
        """Whether somebody listens, so that the map must really be computed."""
        return self.kept is not None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    tap: AttentionTap | None = None,
    key_grid: tuple[int, int] = (0, 0),
    extent: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """`softmax(scale * q kᵀ + mask) v`; by torch's fused kernel, or step by step when `tap` is open.

    Args:
        q: `[..., heads, Nq, d]`.
        k: `[..., heads, Nk, d]`.
        v: `[..., heads, Nk, d_v]`.
        scale: factor on the scores.
        mask: added to the scaled scores, broadcastable to `[..., heads, Nq, Nk]`.
        tap: where a listener may take the attention from.
        key_grid: height and width of the map of keys, for the listener.
        extent: height and width that the keys cover, in units of the layer's input, for the listener.

    Returns:
        `[..., heads, Nq, d_v]`.
    """
    if tap is None or not tap.is_open:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = q @ k.transpose(-1, -2) * scale
    attn = (scores if mask is None else scores + mask).softmax(-1)
    return tap(attn, key_grid, extent) @ v


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[AttentionMap]]]:
    """Keeps the attention of every layer that has an `AttentionTap`, as long as the context lasts.

    Args:
        model: anything that holds operators of this package.

    Yields:
        Layer name → its maps, one per call, in the order of the model's modules. Empty until the model runs.
    """
    taps = {name: module for name, module in model.named_modules() if isinstance(module, AttentionTap)}
    kept: dict[str, list[AttentionMap]] = {name.rpartition(".")[0]: [] for name in taps}
    before = [tap.kept for tap in taps.values()]
    for tap, maps in zip(taps.values(), kept.values(), strict=True):
        tap.kept = maps
    try:
        yield kept
    finally:
        for tap, maps in zip(taps.values(), before, strict=True):
            tap.kept = maps
