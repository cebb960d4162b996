"""A picture of a guided generation: the image, where each subject was attended to step by step, and the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from diffusion.pipelines import AStarPipelineOutput

__all__ = ["attention_grid", "heat"]

_INK, _FAINT, _GRID = (34, 34, 34), (110, 110, 110), (226, 226, 226)
# Okabe and Ito's colours, which people with any colour vision can tell apart.
_CURVES = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
_MARGIN, _GAP, _TEXT = 16, 6, 15
_NAME, _BAR = 200, 52  # widths beside the maps: of the subjects' names at most, of the scale
_TOP = (432, 288)  # the most that the image takes
_PLOT = (420, 96)  # the least that a curve takes


class _Sample(NamedTuple):
    """One sample of a result, on the CPU."""

    image: Image.Image
    subjects: Sequence[str]
    maps: np.ndarray
    """`[steps, H, W, K]`."""
    losses: Mapping[str, np.ndarray]
    """Each `[steps]`; not a number where a loss was not evaluated."""


def attention_grid(result: AStarPipelineOutput, index: int = 0, *, columns: int = 8, tile: int = 128) -> Image.Image:
    """Draws how the attention to each subject developed.

    Above, the generated image and the losses over all steps. Below, a row for each subject: its maps at some steps,
    evenly spaced from the first to the last, over the grey image, with the largest value of each in its corner. All
    maps share one scale of colours, so that a subject that fades is seen to fade. Names are written in Pillow's own
    font, which has the letters of English only.

    Args:
        result: what a pipeline returned when it was called with `return_attention=True`.
        index: which of its images.
        columns: steps to show, at most.
        tile: longer side of a map, in pixels.

    Returns:
        RGB, about `columns · tile` pixels wide.

    Raises:
        ValueError: a result without maps, an index out of range, columns or a tile that are too small.
        TypeError: images that are not PIL images.
    """
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    if tile < 32:
        raise ValueError(f"tile={tile} pixels are too few to see a map in; give 32 or more.")
    sample = _sample(result, index)
    below = _map_rows(sample, columns, tile)
    above = [_fitted(sample.image, *_TOP)]
    if sample.losses:
        space = below.width - 2 * _MARGIN - above[0].width - 2 * _GAP
        above.append(_plots(sample.losses, max(space, _PLOT[0]), above[0].height))
    height = _MARGIN + max(part.height for part in above)
    width = max(below.width, 2 * _MARGIN + sum(part.width + 2 * _GAP for part in above) - 2 * _GAP)
    page = Image.new("RGB", (width, height + below.height), "white")
    left = _MARGIN
    for part in above:
        page.paste(part, (left, _MARGIN))
        left += part.width + 2 * _GAP
    page.paste(below, (0, height))
    return page


def _sample(result: AStarPipelineOutput, index: int) -> _Sample:
    if result.maps is None or result.subjects is None:
        raise ValueError("the result holds no attention maps; call the pipeline with return_attention=True.")
    count = result.maps.shape[1]
    if not 0 <= index < count:
        raise ValueError(f"index={index} is out of range for {count} images; they count from 0.")
    image = result.images[index]
    if not isinstance(image, Image.Image):
        raise TypeError(f"images: expected PIL images, got {type(image).__name__}; call with output_type='pil'.")
    maps = result.maps[:, index].detach().float().cpu().numpy()  # [steps, H, W, K]
    losses = {name: values[:, index].detach().float().cpu().numpy() for name, values in (result.losses or {}).items()}
    return _Sample(image.convert("RGB"), result.subjects[index], np.nan_to_num(maps), losses)


def _map_rows(sample: _Sample, columns: int, tile: int) -> Image.Image:
    """A row for each subject, a column for each step that is shown, and the scale of colours."""
    steps = np.unique(np.linspace(0, len(sample.maps) - 1, columns).round().astype(int))
    grey = np.asarray(_fitted(sample.image, tile, tile).convert("L").convert("RGB"))
    height, width = grey.shape[:2]
    names = [_shortened(subject, _NAME) for subject in sample.subjects]
    top, left = _TEXT + 4 * _GAP, _MARGIN + math.ceil(max(map(_font().getlength, names))) + 2 * _GAP
    rows = len(names)
    size = (left + len(steps) * (width + _GAP) + _BAR + _MARGIN, top + rows * (height + _GAP) + _MARGIN)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    largest = float(sample.maps[..., :rows].max())
    for column, step in enumerate(steps):
        x = left + column * (width + _GAP)
        label = f"step {step + 1}" if column == 0 else f"{step + 1}"
        draw.text((x + width / 2, top - _GAP - 3), label, _FAINT, _font(), "ms")
        for row in range(rows):
            y, values = top + row * (height + _GAP), sample.maps[step, ..., row]
            page.paste(Image.fromarray(heat(grey, values / (largest or 1))), (x, y))
            corner = (x + width - 5, y + height - 4)
            draw.text(corner, f"{values.max():.2f}", "white", _font(12), "rs", stroke_width=2, stroke_fill=_INK)
    for row, name in enumerate(names):
        draw.text((left - 2 * _GAP, top + row * (height + _GAP) + height / 2), name, _INK, _font(), "rm")
    _draw_scale(page, left + len(steps) * (width + _GAP) + _GAP, top, height, largest)
    return page


def heat(grey: np.ndarray, field: np.ndarray, opacity: float = 0.85) -> np.ndarray:
    """Draws a map over a picture, in viridis; where the map is 0, the picture shows.

    Args:
        grey: the picture, `(H, W, 3)`, uint8.
        field: the map, `[h, w]`, from 0 to 1; it is stretched over the picture.
        opacity: how much of the picture the largest values cover, 0 to 1.

    Returns:
        `(H, W, 3)`, uint8.
    """
    height, width = grey.shape[:2]
    field = cv2.resize(field.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    hot = _viridis(field)
    cover = (opacity * field**0.7)[..., None]
    return (grey * (1 - cover) + hot * cover).round().astype(np.uint8)


def _viridis(field: np.ndarray) -> np.ndarray:
    """`(H, W)` from 0 to 1 as `(H, W, 3)`, uint8, RGB."""
    return cv2.applyColorMap((field * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]


def _draw_scale(page: Image.Image, left: int, top: int, height: int, largest: float) -> None:
    """The colours from 0 to the largest value, beside the first row."""
    shades = np.repeat(np.linspace(1, 0, height)[:, None], 12, 1)
    page.paste(Image.fromarray(_viridis(shades)), (left, top))
    draw = ImageDraw.Draw(page)
    draw.text((left + 17, top), f"{largest:.2f}", _FAINT, _font(12), "lt")
    draw.text((left + 17, top + height), "0", _FAINT, _font(12), "lb")


def _plots(losses: Mapping[str, np.ndarray], width: int, height: int) -> Image.Image:
    """The curve of each loss over the steps, one above the other, for each has a scale of its own."""
    left, right, axis = 52, width - 14, 2 * _TEXT + 10
    steps = max(len(values) for values in losses.values())
    each = max(_PLOT[1], (height - axis) // len(losses))
    page = Image.new("RGB", (width, each * len(losses) + axis), "white")
    for i, (name, values) in enumerate(losses.items()):
        panel = _panel(name, values, _CURVES[i % len(_CURVES)], (left, right), each)
        page.paste(panel, (0, i * each))
    draw, y = ImageDraw.Draw(page), each * len(losses)
    for step in _step_ticks(steps):
        x = left + _along(step - 1, steps) * (right - left)
        draw.text((x, y + 4 + _TEXT), f"{step}", _FAINT, _font(12), "ms")
    draw.text(((left + right) / 2, y + axis - 4), "step", _FAINT, _font(), "ms")
    return page


def _panel(
    name: str, values: np.ndarray, colour: tuple[int, int, int], sides: tuple[int, int], height: int
) -> Image.Image:
    """One loss: its name, round numbers at the side, the curve with gaps where it was not evaluated."""
    (left, right), top, bottom = sides, _TEXT + 18, height - 6
    ticks = _ticks(values, most=max(2, (bottom - top) // 22))
    low, high = ticks[0], ticks[-1]

    def height_of(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    canvas = np.full((height, right + 14, 3), 255, np.uint8)
    for tick in ticks:
        y = round(height_of(tick))
        cv2.line(canvas, (left, y), (right, y), _FAINT if tick == low else _GRID, 1)
    along = [left + _along(i, len(values)) * (right - left) for i in range(len(values))]
    _draw_curve(canvas, [(x, height_of(float(value))) for x, value in zip(along, values, strict=True)], colour)
    page = Image.fromarray(canvas)
    draw = ImageDraw.Draw(page)
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        label = f"{tick:.{decimals}f}" if decimals < 5 else f"{tick:.2g}"
        draw.text((left - 7, height_of(tick)), label, _FAINT, _font(12), "rm")
    draw.line((left, 14, left + 20, 14), colour, 3)
    title = f"{name.replace('_', ' ')} loss" + ("" if np.isfinite(values).any() else " (not evaluated)")
    draw.text((left + 27, 19), title, _INK, _font(), "ls")
    return page


def _along(step: int, steps: int) -> float:
    """Where a step lies between the first, 0, and the last, 1; a lone one lies in the middle."""
    return step / (steps - 1) if steps > 1 else 0.5


def _draw_curve(canvas: np.ndarray, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    """Joins neighbours that both have a value; a value without neighbours is a dot."""
    unit = 16  # OpenCV takes fractions of a pixel as integers
    fixed = [(round(x * unit), round(y * unit)) if math.isfinite(y) else None for x, y in points]
    for before, point, after in zip([None, *fixed[:-1]], fixed, [*fixed[1:], None], strict=True):
        if point is not None and after is not None:
            cv2.line(canvas, point, after, colour, 2, cv2.LINE_AA, 4)
        elif point is not None and before is None:
            cv2.circle(canvas, point, 4 * unit, colour, -1, cv2.LINE_AA, 4)


def _ticks(values: np.ndarray, most: int) -> list[float]:
    """Evenly spaced round numbers that enclose all finite values; about `most` of them, two at least."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if high - low < 1e-4 * max(abs(low), abs(high)) or high == low:
        around = 0.1 * abs(high) or 1.0
        low, high = (low - around, high + around) if low else (0.0, around)
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= 0.999 * rough)
    return [step * i for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def _step_ticks(steps: int) -> list[int]:
    """The first and the last step, and multiples of a round number between."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, steps) if steps / n <= 10)
    between = [step for step in range(every, steps, every) if step > 1 and steps - step > every / 2]
    return list(dict.fromkeys([1, *between, steps]))


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image as large as fits in."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _font(size: int = _TEXT) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _shortened(text: str, width: float) -> str:
    """The text, cut off with an ellipsis if it is too long."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
