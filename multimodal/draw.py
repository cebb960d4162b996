"""Maps over pictures, as a vision-language model sees these."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from PIL import Image

__all__ = ["overlay", "seen_part"]

_LEAST_SIDE = 336  # pixels of the longer side of what is drawn


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
    scale = max(_LEAST_SIDE / max(picture.size), 1)
    width, height = (round(side * scale) for side in picture.size)
    shown = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    smooth = cv2.resize(field.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    hot = cv2.applyColorMap((smooth * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    cover = (opacity * smooth**0.7)[..., None]
    return Image.fromarray((shown * (1 - cover) + hot * cover).round().astype(np.uint8))
