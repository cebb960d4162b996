"""Maps over pictures, as a vision-language model sees these."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from PIL import Image

__all__ = ["draw_merged", "overlay", "seen_part"]

_LEAST_SIDE = 336  # pixels of the longer side of what is drawn
_DROPPED = (30, 30, 34)


def seen_part(processor: Any, picture: Image.Image) -> Image.Image:
    """The part of a picture that a processor shows its model: the middle where it crops, else all.

    Args:
        processor: Of a vision-language model, or its image processor.
        picture: As it is given to the processor.
    """
    own = getattr(processor, "image_processor", processor)
    if not getattr(own, "do_center_crop", False):
        return picture
    width, height = picture.size
    size = dict(own.size) if getattr(own, "do_resize", False) else {"width": width, "height": height}
    if (shortest := size.get("shortest_edge")) is not None:
        across, down = (side * shortest / min(picture.size) for side in picture.size)
    else:
        across, down = size["width"], size["height"]
    half_width = width * own.crop_size["width"] / across / 2
    half_height = height * own.crop_size["height"] / down / 2
    left, top = round(width / 2 - half_width), round(height / 2 - half_height)
    return picture.crop((left, top, round(width / 2 + half_width), round(height / 2 + half_height)))


def overlay(picture: Image.Image, field: np.ndarray, opacity: float = 0.75) -> Image.Image:
    """A map over a picture; where it is 0, the picture shows.

    Args:
        picture: The picture. A small one is enlarged.
        field: From 0 to 1, `[h, w]`, over the whole of it.
        opacity: Of the map where it is 1.

    Returns:
        RGB.
    """
    shown = _enlarged(picture)
    height, width = shown.shape[:2]
    smooth = cv2.resize(field.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    hot = cv2.applyColorMap((smooth * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    cover = (opacity * smooth**0.7)[..., None]
    return Image.fromarray((shown * (1 - cover) + hot * cover).round().astype(np.uint8))


def draw_merged(picture: Image.Image, own: np.ndarray, into: np.ndarray, opacity: float = 0.7) -> Image.Image:
    """Which image tokens were kept and which were merged, over a picture.

    A token that stays as it is leaves the picture clear. Those that went into one token share a colour and an outline,
    with a dot where that token stands; dropped ones are dark.

    Args:
        picture: The picture. A small one is enlarged.
        own: The token at each place, `[h, w]`, integers, over the whole of it: a grid of
            `multimodal.grids.picture_grids`.
        into: The token that it went into, as `target` of `multimodal.vmtc.Picture` says: itself, or -1 where dropped.
        opacity: Of the colours.

    Returns:
        RGB.
    """
    shown = _enlarged(picture)
    height, width = shown.shape[:2]
    left, members = np.unique(into[into >= 0], return_counts=True)
    merged = left[members > 1]
    spread = np.linspace(20, 235, max(len(merged), 1)).round().astype(np.uint8)
    colours = cv2.applyColorMap(spread[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    group = np.searchsorted(merged, into)
    covered = np.isin(into, merged)
    cover = np.where((into < 0)[..., None], _DROPPED, colours[np.where(covered, group, 0)])
    rows, columns = (
        np.arange(pixels) * places // pixels for pixels, places in zip((height, width), own.shape, strict=True)
    )
    at = np.ix_(rows, columns)
    hidden = (covered | (into < 0))[at]
    shown = np.where(hidden[..., None], (1 - opacity) * shown + opacity * cover[at], shown).round().astype(np.uint8)
    shown[_edges(np.where(covered, group, np.where(into < 0, -1, -2))[at])] = 255
    for row, column in np.argwhere(covered & (own == into)):
        centre = (int((column + 0.5) * width / own.shape[1]), int((row + 0.5) * height / own.shape[0]))
        radius = max(2, min(height // own.shape[0], width // own.shape[1]) // 7)
        cv2.circle(shown, centre, radius + 1, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(shown, centre, radius, (255, 255, 255), -1, cv2.LINE_AA)
    return Image.fromarray(shown)


def _enlarged(picture: Image.Image) -> np.ndarray:
    """As RGB, `(H, W, 3)`, uint8."""
    scale = max(_LEAST_SIDE / max(picture.size), 1)
    size = [round(side * scale) for side in picture.size]
    return np.array(picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC))


def _edges(groups: np.ndarray) -> np.ndarray:
    """Pixels, two wide, where one group ends and another begins."""
    edges = np.zeros(groups.shape, bool)
    below, right = groups[1:] != groups[:-1], groups[:, 1:] != groups[:, :-1]
    edges[1:] |= below
    edges[:-1] |= below
    edges[:, 1:] |= right
    edges[:, :-1] |= right
    return edges
