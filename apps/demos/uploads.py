"""Pictures from visitors, or samples of ours: how large, of which kind, and what to say of those not taken."""

from __future__ import annotations

import functools
import os
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image, UnidentifiedImageError

from ..batch.decode import Unreadable, image_suffixes, read_image
from .host import Settings

__all__ = ["chosen", "picture", "read_upload", "samples", "upload"]


def upload(label: str, **options: Any) -> gr.Image:
    """A place for one picture, which reaches its handler as the path of the file, unopened.

    `gr.Image` decodes first and asks later: a file that is no picture, or one of a billion pixels, would be met by
    Gradio and not by us. (A class of our own would make Gradio write a stub file beside this one.)

    Args:
        label: Of the control.
        **options: Of `gr.Image`.
    """
    image = gr.Image(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], **options)

    def path_of(payload: ImageData | None) -> str | None:
        return None if payload is None else payload.path

    setattr(image, "preprocess", path_of)  # noqa: B010 - of this one
    return image


@functools.cache
def samples(kind: str) -> dict[str, Path]:
    """Pictures that come with the demo, by name.

    Args:
        kind: A folder of `examples`: `"photographs"`, `"scenes"`, `"shelves"`.
    """
    folder = Path(str(resources.files("apps.demos") / "examples" / kind))
    return {path.stem.replace("_", " "): path for path in sorted(folder.iterdir()) if path.suffix in (".jpg", ".png")}


def picture(page: str, kind: str) -> tuple[gr.Image, gr.Dropdown]:
    """Draws the controls for the picture of a page: a place to upload one, and samples to choose from.

    Args:
        page: Begins the `elem_id`s: `see-image`, `see-sample`, `see-samples`.
        kind: Which samples.

    Returns:
        What a handler takes as `image` and `sample`, for `chosen`; the second has a place in a permalink.
    """
    image = upload("Picture", elem_id=f"{page}-image", height=280)
    here = samples(kind)
    thumbnails = gr.Gallery(
        [(str(path), name) for name, path in here.items()],
        label="Samples",
        elem_id=f"{page}-samples",
        columns=len(here),
        rows=1,
        height=110,
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
    )
    sample = gr.Dropdown(["", *here], value="", label="Sample", elem_id=f"{page}-sample", filterable=False)
    quiet: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}

    def pick(event: gr.SelectData) -> str:
        return [*here][event.index]

    thumbnails.select(pick, None, sample, **quiet)
    sample.change(lambda name: str(here[name]) if name else gr.skip(), sample, image, **quiet)
    image.upload(lambda: "", None, sample, **quiet)
    image.clear(lambda: "", None, sample, **quiet)
    return image, sample


def chosen(image: str | None, sample: str, kind: str, settings: Settings) -> Image.Image:
    """The picture that a visitor means: the sample, where one is named, else what was uploaded.

    Args:
        image: Path of an upload.
        sample: Name of a sample, or nothing.
        kind: Of the samples.
        settings: With the limits.

    Raises:
        Unreadable: See `read_upload`; or there is no such sample.
    """
    if not sample:
        return read_upload(image, settings)
    path = samples(kind).get(sample)
    if path is None:
        raise Unreadable(f"there is no sample {sample!r}: expected one of {', '.join(samples(kind))}")
    return read_upload(str(path), settings)


def read_upload(path: str | None, settings: Settings) -> Image.Image:
    """Reads the picture of a visitor, upright, as RGB.

    Args:
        path: Of the file, as `upload` gives it.
        settings: With the limits.

    Raises:
        Unreadable: There is none, it is too large, no picture, an animation, or damaged.
    """
    if path is None:
        raise Unreadable("there is no picture yet: upload one, or choose an example")
    if not os.path.isfile(path):
        raise Unreadable("the picture is no longer here, as files are removed after a while: upload it again")
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
