"""Bytes of an image file in, a small uint8 array for the network out, or the reason why not.

What cannot be read completely is an error, never a picture that is grey from half its height. Transparency is laid
on white, an animation stands for its first frame, and colour profiles are not applied, as in the networks' training.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import in_one_line
from .processor import give_back_freed_memory
from .remote import open_file, read_range
from .tables import picture_bytes

if TYPE_CHECKING:
    from .sources import Source

__all__ = ["Decoded", "Decoder", "Framing", "Unreadable", "View", "image_suffixes", "read_image", "read_source"]

# Documents, drawings and scientific containers that Pillow lists but cannot read, or only with another program.
_NOT_PHOTOGRAPHS = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"})

# A longer strip would be blown up to millions of pixels when its short side is brought to the network's size, only to
# be cropped to the middle.
_MAX_ASPECT = 16

# Pixels that are converted at once, so that what lies between one mode and the other is never as large as the picture.
_BAND = 1 << 20


@functools.cache
def _formats() -> tuple[str, ...]:
    """Names of the formats that are read; also registers HEIC/AVIF where `attnsuite[heic]` is installed."""
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif  # pyright: ignore[reportMissingImports] - an extra

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_PHOTOGRAPHS)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, dot included, of the image formats that can be read here."""
    readable = _formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def read_image(file: BinaryIO, enough: int | None = None) -> Image.Image:
    """Reads the first picture of an image file, upright, as RGB.

    Args:
        file: The file, open for reading in binary.
        enough: A JPEG may come out at 1/2, 1/4 or 1/8 of its size if no side is then shorter than this; None for its
            full size. `info["full_size"]` of the picture has the upright width and height that it would have had.

    Returns:
        The picture in mode `RGB`.

    Raises:
        UnidentifiedImageError: It is in no known format.
        Image.DecompressionBombError: It has more pixels than Pillow's limit allows.
        OSError: It is cut short or damaged. A damaged file can raise other errors, too.
    """
    with warnings.catch_warnings():
        # Half the limit is a large photograph; other warnings are about metadata that is not used here.
        warnings.simplefilter("ignore")
        image = Image.open(file, formats=_formats())
        width, height = image.size
        if enough is not None:
            image.draft(None, (enough, enough))  # does nothing for other formats
        stored = image.size
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:
            pass
        upright = _to_rgb(image)
        upright.info["full_size"] = (width, height) if image.size == stored else (height, width)
        return upright


class Unreadable(Exception):
    """A source cannot be read; the message is one line without its name, which stands beside it."""


def read_source(source: Source) -> Image.Image:
    """Reads the picture of one source, upright, as RGB.

    Args:
        source: A file or a place in an archive.

    Returns:
        The picture in mode `RGB`; of one that is far longer than wide the middle.

    Raises:
        Unreadable: Why not.
    """
    if source.error is not None:
        raise Unreadable(source.error)
    try:
        with _open(source) as file:
            return _cut_strip(read_image(file))
    except Exception as error:
        raise Unreadable(_explain(error, source)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip everything above 255
        convert = _scaler(image)
    elif image.has_transparency_data:
        convert = _on_white
    else:
        return image.convert("RGB")
    result = Image.new("RGB", image.size)
    for top, band in _bands(image):
        result.paste(convert(band), (0, top))
    return result


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Parts of full width, from the top down, each with the row that it begins at."""
    rows = max(1, _BAND // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)


def _scaler(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """16-bit integers by their full range; wider ones and floats, whose range is anyone's, from least to greatest."""
    low, high = 0.0, float(0xFFFF)
    if not image.mode.startswith("I;16"):
        extremes = [value for _, band in _bands(image) for value in (_numbers(band).min(), _numbers(band).max())]
        low, high = float(min(extremes)), float(max(extremes))
    if image.mode.startswith("I") and 0 <= low and high <= 0xFFFF:
        return lambda band: Image.fromarray((np.asarray(band).astype(np.uint32) * 255 // 0xFFFF).astype(np.uint8))
    factor = 255 / (high - low) if high > low else 0
    return lambda band: Image.fromarray(((_numbers(band) - low) * factor).astype(np.uint8))


def _numbers(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image).astype(np.float64))


@dataclass(frozen=True)
class Framing:
    """Which part of a picture the network gets to see: timm's resize and crop, as numbers.

    Attributes:
        size: Height and width of what the network sees.
        crop_pct: Share of the resized picture that is kept.
        mode: timm's `crop_mode`: `"center"`, `"squash"` or `"border"`.
    """

    size: tuple[int, int]
    crop_pct: float
    mode: str

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of that part, in pixels of the picture; `border` reaches beyond it."""
        resized_h, resized_w = (math.floor(side / self.crop_pct) for side in self.size)
        across, down = width / resized_w, height / resized_h
        if self.mode != "squash":
            across = down = max(across, down) if self.mode == "border" else min(across, down)
        half_w, half_h = self.size[1] * across / 2, self.size[0] * down / 2
        return width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h


@dataclass(frozen=True)
class View:
    """A picture to draw on, for verbs that show something.

    Attributes:
        picture: `(height, width, 3)`, uint8, RGB.
        box: Left, top, right and bottom in `picture` of what the network sees.
    """

    picture: np.ndarray
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Decoded:
    """One source after decoding.

    Attributes:
        pixels: `(C, H, W)`, uint8, what the network sees; None if the source could not be read.
        width: Width of the upright picture, if it could be read.
        height: Its height.
        error: Why it could not be read.
        view: The picture to draw on, if the decoder was asked for it.
    """

    pixels: np.ndarray | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None
    view: View | None = None


@dataclass(frozen=True)
class Decoder:
    """Decodes sources for one network; can be sent to other processes.

    Attributes:
        transform: From an RGB picture to a uint8 tensor `(C, H, W)`.
        framing: What part of the picture `transform` keeps.
        channels: 3 for colour, 1 for a network of grey pictures.
        view_size: Longest side of the picture to draw on; 0 for none.
        keep_strips: Take pictures whole that are far longer than wide; `transform` must bound what becomes of them.
        enough: Shortest side from which `transform` makes nearly the same of a smaller picture; JPEGs are then decoded
            at 1/2, 1/4 or 1/8 of their size. None decodes every pixel.
    """

    transform: Callable[[Image.Image], Any]
    framing: Framing
    channels: int = 3
    view_size: int = 0
    keep_strips: bool = False
    enough: int | None = None

    def __call__(self, source: Source) -> Decoded:
        """Reads one source. Never raises for what is wrong with a file: the result says it."""
        if source.error is not None:
            return Decoded(error=source.error)
        try:
            with _open(source) as file:
                image = read_image(file, self.enough)
            width, height = image.info["full_size"]
            return replace(self.prepare(image), width=width, height=height)
        except Exception as error:
            if isinstance(error, MemoryError):
                give_back_freed_memory()  # of the attempt, for what comes next
            return Decoded(error=_explain(error, source))

    def reduced(self) -> Decoder:
        """The same, for JPEGs that are decoded at the smallest size that has two pixels for each that is kept."""
        return replace(self, enough=2 * max(math.ceil(side / self.framing.crop_pct) for side in self.framing.size))

    def prepare(self, image: Image.Image) -> Decoded:
        """What becomes of a picture that is open already, RGB and upright."""
        width, height = image.size
        if not self.keep_strips:
            image = _cut_strip(image)
        view = self._view(image) if self.view_size else None
        if self.channels == 1:
            image = image.convert("L")
        return Decoded(np.asarray(self.transform(image)), width, height, view=view)

    def _view(self, image: Image.Image) -> View:
        left, top, right, bottom = self.framing.box(*image.size)
        small = image.copy()
        small.thumbnail((self.view_size, self.view_size))
        x, y = small.width / image.width, small.height / image.height
        return View(np.asarray(small), (left * x, top * y, right * x, bottom * y))


def _open(source: Source) -> BinaryIO:
    if source.member is None:
        return open_file(source.path)
    if source.path.lower().endswith(".parquet"):
        return io.BytesIO(picture_bytes(source.path, source.offset, source.stamp))
    content = read_range(source.path, source.offset, source.size)
    if len(content) < source.size:
        raise OSError(f"the archive ends after {len(content):,} of {source.size:,} bytes")
    return io.BytesIO(content)


def _cut_strip(image: Image.Image) -> Image.Image:
    """The middle of a picture that is far longer than wide; others as they are."""
    width, height = image.size
    longest = _MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    keep_w, keep_h = min(width, longest), min(height, longest)
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    return image.crop((left, top, left + keep_w, top + keep_h))


def _explain(error: Exception, source: Source) -> str:
    """One line for a row, without the path, which stands beside it."""
    if isinstance(error, UnidentifiedImageError):
        empty = source.size == 0 if source.member is not None else source.stamp.startswith("0:")
        return "the file is empty" if empty else "not an image in a format that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {error}"
    if isinstance(error, MemoryError):
        return "not enough memory to decode this image"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot read this file: {error.strerror}"
    return f"damaged image: {in_one_line(error)}"
