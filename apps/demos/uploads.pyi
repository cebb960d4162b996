"""Pictures from visitors: how large, of which kind, and what to say of those that cannot be taken."""

from __future__ import annotations

import os
import warnings
from typing import Any

import gradio as gr
from gradio.components.image import ImageData
from PIL import Image, UnidentifiedImageError

from ..batch.decode import Unreadable, image_suffixes, read_image
from .host import Settings

__all__ = ["Upload", "read_upload"]

from gradio.events import Dependency

class Upload(gr.Image):
    """A place for one picture, which reaches its handler as the path of the file, unopened.

    `gr.Image` decodes first and asks later: a file that is no picture, or one of a billion pixels, would be met by
    Gradio and not by us.
    """

    is_template = True  # the page draws it as its base class

    def __init__(self, label: str, **options: Any) -> None:
        super().__init__(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], **options)

    def preprocess(self, payload: ImageData | None) -> str | None:
        """The path of what was uploaded."""
        return None if payload is None else payload.path

    def get_config(self, cls: type[gr.blocks.Block] | None = None) -> dict[str, Any]:
        """What the page is told of it: all that it is told of any image."""
        return super().get_config(cls or gr.Image)
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

def read_upload(path: str | None, settings: Settings) -> Image.Image:
    """Reads the picture of a visitor, upright, as RGB.

    Args:
        path: Of the file, as `Upload` gives it.
        settings: With the limits.

    Raises:
        Unreadable: There is none, it is too large, no picture, an animation, or damaged.
    """
    if path is None:
        raise Unreadable("there is no picture yet: upload one, or choose an example")
    if os.path.getsize(path) > settings.max_megabytes * 1e6:
        raise Unreadable(f"the file has more than {settings.max_megabytes} MB: save a smaller copy of it")
    try:
        _check_header(path, settings)
        with open(path, "rb") as file:
            return read_image(file)
    except UnidentifiedImageError as error:
        names = ", ".join(sorted(image_suffixes() & {".avif", ".bmp", ".jpg", ".png", ".tif", ".webp"}))
        raise Unreadable(f"this file is no picture that can be read: expected {names} and the like") from error
    except (MemoryError, Unreadable):
        raise
    except Image.DecompressionBombError as error:
        raise Unreadable(_too_many(settings)) from error
    except Exception as error:  # Pillow passes on whatever its decoders raise
        raise Unreadable(f"this picture is damaged ({' '.join(str(error).split())}): save it anew") from error

def _check_header(path: str, settings: Settings) -> None:
    """Refuses by what the file says of itself, before any of it is decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            width, height = image.size
            if width * height > settings.max_megapixels * 1e6:
                raise Unreadable(_too_many(settings, f"{width} × {height} pixels"))
            if getattr(image, "is_animated", False):
                raise Unreadable("this is an animation: save the one frame that you mean as a picture")

def _too_many(settings: Settings, size: str = "more pixels than that") -> str:
    return f"the picture is too large, at {size}: at most {settings.max_megapixels} megapixels are taken"
