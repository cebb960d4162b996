"""Scaled dot-product attention that can be listened to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionMap", "AttentionTap", "attend", "attention_layers", "record_attention"]


class AttentionMap(NamedTuple):
    """One layer's attention, kept by `record_attention`."""

    attn: Tensor
    """`[B, heads, Nq, Nk]`, rows sum to 1; still part of the autograd graph."""
    key_grid: tuple[int, int]
    """Height and width of the map of keys, row by row, with padding if there was any: `Nk = height * width`, or the
    last so many keys where class tokens stand in front. (0, 0): the layer does not know."""
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
    """Keeps the attention of every layer, as long as the context lasts.

    Listens to layers with an `AttentionTap`, and to any layer of timm's that has `fused_attn` and `attn_drop` (those of
    ViT, DeiT, EVA, Swin and others): these take timm's step-by-step path inside the context and are what they were
    afterwards. A compiled network has to be recorded before it is compiled.

    Args:
        model: a network, or the part of it to listen to.

    Yields:
        Layer name → its maps, one per call, in the order of the model's modules. Empty until the model runs. Maps of
        timm's layers come after their dropout and have `key_grid` (0, 0): the layer does not know its grid.
    """
    taps, fused = _listenable(model)
    kept: dict[str, list[AttentionMap]] = {name: [] for name in attention_layers(model)}
    before = [(tap, "kept", tap.kept) for tap in taps.values()]
    before += [(module, "fused_attn", module.fused_attn) for module in fused.values()]
    handles = []
    try:
        for name, tap in taps.items():
            tap.kept = kept[name]
        for name, module in fused.items():
            setattr(module, "fused_attn", False)  # noqa: B010 - typed as a constant of torch.jit
            handles.append(module.get_submodule("attn_drop").register_forward_hook(_keeper(kept[name])))
        yield kept
    finally:
        for handle in handles:
            handle.remove()
        for module, attribute, value in before:
            setattr(module, attribute, value)


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose attention `record_attention` can keep, in the order of the model's modules."""
    taps, fused = _listenable(model)
    return [name for name, _ in model.named_modules() if name in taps or name in fused]


def _listenable(model: nn.Module) -> tuple[dict[str, AttentionTap], dict[str, nn.Module]]:
    """Name of the layer → its tap, and name → layer for those of timm's that have none."""
    modules = dict(model.named_modules())
    taps = {name.rpartition(".")[0]: module for name, module in modules.items() if isinstance(module, AttentionTap)}
    return taps, {name: m for name, m in modules.items() if name not in taps and _is_timm_attention(m)}


def _is_timm_attention(module: nn.Module) -> bool:
    """Whether a layer has timm's two paths, of which one passes its attention through a dropout."""
    return isinstance(getattr(module, "fused_attn", None), bool) and isinstance(
        getattr(module, "attn_drop", None), nn.Module
    )


def _keeper(maps: list[AttentionMap]) -> Callable[[nn.Module, tuple, Tensor], None]:
    """A forward hook that keeps a dropout's output as a map."""

    def keep(_: nn.Module, args: tuple, attn: Tensor) -> None:
        maps.append(AttentionMap(attn, (0, 0), (1.0, 1.0)))

    return keep
