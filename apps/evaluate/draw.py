"""The confusion matrix as a picture: rows are what is shown, columns what it is taken for.

Colours are viridis, which people with any colour vision can tell apart. Text is in Pillow's own font, which has the
letters of English only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_confusion"]

_INK, _FAINT = (34, 34, 34), (110, 110, 110)
_MARGIN, _GAP, _TEXT = 16, 8, 14
_NAMED = 60  # classes up to which each has its name
_COUNTED = 20  # classes up to which each cell has its count
_SIDE = 900  # of the matrix, in pixels, or as near as whole cells come
_LONGEST = 24  # letters of a name
_OTHER = "(others)"

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _Frame(NamedTuple):
    """Where the matrix lies on its page."""

    left: int
    top: int
    cell: int


def draw_confusion(counts: np.ndarray, names: Sequence[str], title: str) -> Image.Image:
    """Draws a confusion matrix; a cell's colour is its share of its row, of more than 60 classes that share's root.

    Up to 60 classes have their names at the sides and up to 20 their counts in the cells; of more there are numbers of
    classes at the sides, so that a thousand classes still fit on a screen.

    Args:
        counts: `[classes, classes + 1]`: right class by predicted class; the last column counts predictions of classes
            that are not among these.
        names: Of the classes.
        title: Stands above.

    Returns:
        RGB.

    Raises:
        ValueError: Another shape, or no classes.
    """
    classes = len(names)
    if not classes or counts.shape != (classes, classes + 1):
        raise ValueError(f"counts {counts.shape}: expected {(classes, classes + 1)} for {classes} names.")
    shown = [*names, _OTHER] if counts[:, -1].any() else list(names)
    counts = counts[:, : len(shown)]
    labels = [_short(name) for name in shown] if classes <= _NAMED else []
    font = ImageFont.load_default(_TEXT)
    space = max([int(font.getlength(label)) for label in labels], default=50) + _GAP
    frame = _Frame(_MARGIN + _TEXT + _GAP + space, _MARGIN + 3 * _TEXT + space, max(1, _SIDE // classes))
    width = frame.left + frame.cell * counts.shape[1] + _MARGIN
    page = Image.new("RGB", (max(width, 480), frame.top + frame.cell * classes + _MARGIN), "white")
    page.paste(_cells(counts, frame.cell), (frame.left, frame.top))
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, _INK, font)
    draw.text((frame.left, _MARGIN + _TEXT + 6), "predicted", _FAINT, font)
    page.paste(_upright("shown", font, _FAINT), (_MARGIN, frame.top))
    _axes(page, frame, labels, counts.shape, font)
    if classes <= _COUNTED:
        _counts(draw, frame, counts, font)
    return page


def _cells(counts: np.ndarray, cell: int) -> Image.Image:
    """Coloured cells without text; a row of no pictures is grey."""
    total = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(total, 1)
    if len(counts) > _NAMED:  # a cell of a few pixels would not be seen if it were nearly as dark as its ground
        share = np.sqrt(share)
    colours = cv2.applyColorMap(np.round(255 * share).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1].copy()
    colours[total[:, 0] == 0] = 200
    large = np.kron(colours, np.ones((cell, cell, 1), np.uint8))
    if cell >= 8:
        large[::cell] = large[:, ::cell] = 255
    return Image.fromarray(large)


def _axes(page: Image.Image, frame: _Frame, labels: Sequence[str], shape: tuple[int, ...], font: _Font) -> None:
    """Names of all classes at both sides, or every so many numbers of classes."""
    step = 1 if labels else _step(shape[0])
    draw = ImageDraw.Draw(page)
    for index in range(0, shape[1] if labels else shape[0], step):
        text = labels[index] if labels else str(index)
        middle = round((index + 0.5) * frame.cell)
        if index < shape[0]:
            place = (frame.left - _GAP, frame.top + middle)
            draw.text(place, text, _INK, font, anchor="rm")
        upright = _upright(text, font, _INK)
        page.paste(upright, (frame.left + middle - upright.width // 2, frame.top - _GAP - upright.height))


def _step(classes: int) -> int:
    """A round number of classes from one tick to the next, for about ten of them."""
    rough = classes / 10
    power = 10 ** int(np.floor(np.log10(max(rough, 1))))
    return int(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough))


def _counts(draw: ImageDraw.ImageDraw, frame: _Frame, counts: np.ndarray, font: _Font) -> None:
    total = counts.sum(axis=1)
    for row, column in np.argwhere(counts > 0):
        light = counts[row, column] > 0.6 * total[row]  # the upper end of viridis is yellow
        place = [frame.left + (column + 0.5) * frame.cell, frame.top + (row + 0.5) * frame.cell]
        draw.text((place[0], place[1]), f"{counts[row, column]:,}", _INK if light else "white", font, anchor="mm")


def _upright(text: str, font: _Font, colour: tuple[int, int, int]) -> Image.Image:
    """Text that runs upwards."""
    box = Image.new("RGB", (int(font.getlength(text)) + 2, _TEXT + 4), "white")
    ImageDraw.Draw(box).text((1, 0), text, colour, font)
    return box.rotate(90, expand=True)


def _short(name: str) -> str:
    first = name.split(",")[0].strip()
    return first if len(first) <= _LONGEST else first[: _LONGEST - 3].rstrip() + "..."
