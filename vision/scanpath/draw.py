"""Scanpaths over their picture: circles in order, several side by side, as a density of looks, and as a film.

Colours are Okabe and Ito's and viridis, which people with any colour vision can tell apart; what belongs together is
told by numbers and names too. Text is in Pillow's own font, which has the letters of English only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from vision.scanpath.objects import Box, Objects
from vision.scanpath.pairs import checked_points, joined, listed

__all__ = ["density_map", "draw_density", "draw_scanpaths", "write_gif"]

# Blue and vermillion first: a person and a model.
_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
_INK, _TARGET = (34, 34, 34), (240, 228, 66)
_GAP, _TITLE = 8, 26
_FINE = 2  # all is drawn so many times larger, then made smaller, for smooth edges
_CROWDED = 20  # stops from which on circles get smaller


class _Stop(NamedTuple):
    """A place that was looked at, once or several times."""

    x: float
    y: float
    radius: float
    label: str


def draw_scanpaths(
    picture: Image.Image | np.ndarray,
    scanpaths: ArrayLike | Mapping[str, ArrayLike],
    *,
    target: Box | None = None,
    objects: Objects | None = None,
    longer_side: int = 768,
) -> Image.Image:
    """Draws scanpaths over their picture: a numbered circle for each fixation, arrows from one to the next.

    A circle's area is in proportion to how long the look stayed: to the duration where it is given, else to the number
    of fixations in a row on the very same place. Fixations on the same place share a circle with all their numbers, as
    those of a model do that looks at the centres of objects. What lies outside the picture is not seen.

    Args:
        picture: RGB; an array is `[H, W, 3]`, uint8.
        scanpaths: fixations in pixels of the picture, `[T, 2]`, or `[T, 3]` with durations; or the same by name, such
            as human and model, for panels side by side. None at all gives the picture alone.
        target: what was searched for, framed.
        objects: outlined.
        longer_side: of each panel, in pixels.

    Returns:
        RGB.

    Raises:
        ValueError: coordinates that are not finite, another shape, a picture that is no RGB, no scanpaths by name, a
            side that is too short.
    """
    return _Sheet(picture, scanpaths, target, objects, longer_side).drawn()


def write_gif(
    path: str | Path,
    picture: Image.Image | np.ndarray,
    scanpaths: ArrayLike | Mapping[str, ArrayLike] | Sequence[Mapping[str, ArrayLike]],
    *,
    target: Box | None = None,
    objects: Objects | None = None,
    longer_side: int = 512,
    seconds: float = 0.4,
) -> None:
    """Writes a film in which the fixations of `draw_scanpaths` appear one after the other; it starts over at its end.

    Args:
        path: the file, .gif.
        picture: as in `draw_scanpaths`.
        scanpaths: as in `draw_scanpaths`. Several by name run at a time, each at its own pace; in a list of such, of
            equally many names each, one after the other.
        target: as in `draw_scanpaths`.
        objects: as in `draw_scanpaths`.
        longer_side: of each panel, in pixels.
        seconds: how long a fixation without a duration stays; durations are seconds here.

    Raises:
        ValueError: as `draw_scanpaths`; also another suffix, `seconds` that are not positive, or a list with unequally
            many names.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"{path}: expected a name that ends in .gif.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds={seconds} must be positive.")
    several = isinstance(scanpaths, Sequence) and len(scanpaths) and all(isinstance(one, Mapping) for one in scanpaths)
    films: list[Any] = [*cast(Sequence[Any], scanpaths)] if several else [scanpaths]
    if several and len({len(one) for one in films}) > 1:
        raise ValueError(f"a film has as many panels all along, not {', '.join(str(len(one)) for one in films)}.")
    frames, lasting = [], []
    for one in films:
        shown, times = _film(_Sheet(picture, one, target, objects, longer_side), seconds)
        frames += shown
        lasting += times
    # One palette for all, that of the last frame with everything in it, or the picture would flicker.
    palette = frames[-1].quantize(256)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=lasting, loop=0, disposal=1)


def _film(sheet: _Sheet, seconds: float) -> tuple[list[Image.Image], list[int]]:
    """Frames, and how long each lasts in milliseconds."""
    begins = [np.cumsum([0, *np.where(np.isnan(p[:, 2]), seconds, p[:, 2])]) for p in sheet.paths]
    moments = np.unique(np.round(np.concatenate(begins), 2))  # a GIF counts hundredths of a second
    frames = [sheet.drawn([int((times[:-1] <= now + 0.005).sum()) for times in begins]) for now in moments[:-1]]
    lasting = [round(1000 * step) for step in np.diff(moments)] or [1000]
    lasting[-1] += 1000
    return frames or [sheet.drawn()], lasting


def density_map(
    scanpaths: ArrayLike | Sequence[ArrayLike], size: tuple[int, int], sigma: float | None = None
) -> np.ndarray:
    """How much each place was looked at: a Gaussian around each fixation, weighted by its duration where all have one.

    Args:
        scanpaths: `[T, 2]` or `[T, 3]` with durations, in pixels; or a list of such.
        size: width and height of the picture.
        sigma: of the Gaussian, in pixels; a degree of visual angle is usual. By default a 30th of the longer side.

    Returns:
        `[H, W]`, float32, from 0 to 1 at the densest place; all 0 without fixations.

    Raises:
        ValueError: coordinates that are not finite, another shape, a size or sigma that is not positive.
    """
    width, height = size
    sigma = max(size) / 30 if sigma is None else sigma
    if not (min(size) > 0 and 0 < sigma < math.inf):
        raise ValueError(f"size={size} and sigma={sigma} must be positive numbers of pixels.")
    points, _ = joined(listed(scanpaths, dim=2)[0], dim=2)
    weights = points[:, 2] if not np.isnan(points[:, 2]).any() else np.ones(len(points))
    columns, rows = (
        np.exp(-0.5 * ((np.arange(side) + 0.5 - points[:, axis, None]) / sigma) ** 2).astype(np.float32)
        for axis, side in enumerate((width, height))
    )
    field = (rows * weights[:, None].astype(np.float32)).T @ columns  # [H, W]
    return field / max(float(field.max(initial=0)), np.finfo(np.float32).tiny)


def draw_density(
    picture: Image.Image | np.ndarray,
    scanpaths: ArrayLike | Sequence[ArrayLike],
    *,
    sigma: float | None = None,
    longer_side: int = 768,
) -> Image.Image:
    """Draws `density_map` over the picture in grey: where nobody looked the picture shows.

    Args:
        picture: RGB; an array is `[H, W, 3]`, uint8.
        scanpaths: `[T, 2]` or `[T, 3]` with durations, in pixels of the picture; or a list of such.
        sigma: of the Gaussian, in pixels of the picture.
        longer_side: of the result, in pixels.

    Returns:
        RGB.

    Raises:
        ValueError: as `density_map`; also a picture that is no RGB, a side that is too short.
    """
    import cv2

    base, scale = _fitted(picture, longer_side)
    several = [checked_points(path, "scanpath") * (scale, scale, 1) for path in listed(scanpaths, dim=2)[0]]
    several = [path if not np.isnan(path).any() else path[:, :2] for path in several]
    field = density_map(several, base.size, None if sigma is None else sigma * scale)
    colours = cv2.applyColorMap((field * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    grey = np.asarray(base.convert("L"), float)[..., None]
    cover = 0.85 * field[..., None] ** 0.6
    return Image.fromarray((grey * (1 - cover) + colours * cover).round().astype(np.uint8))


class _Sheet:
    """Panels of one picture with a scanpath each, of which the beginnings can be drawn."""

    def __init__(self, picture: Any, scanpaths: Any, target: Box | None, objects: Objects | None, longer_side: int):
        self.names = list(scanpaths) if isinstance(scanpaths, Mapping) else []
        several = list(scanpaths.values()) if isinstance(scanpaths, Mapping) else [scanpaths]
        if not several:
            raise ValueError("no scanpaths by name were given; an empty list draws the picture alone.")
        self.base, self.scale = _fitted(picture, longer_side)
        # A lighter picture lets the circles stand out.
        self.base = Image.blend(self.base, Image.new("RGB", self.base.size, "white"), 0.2)
        self.paths = [
            checked_points(path, self.names[n] if self.names else "scanpath") for n, path in enumerate(several)
        ]
        draw = ImageDraw.Draw(self.base, "RGBA")
        for box in () if objects is None else objects.boxes:
            draw.rectangle([round(side) for side in (box * self.scale).tolist()], outline=(255, 255, 255, 110))
        if target is not None:
            _frame(draw, np.array(target, float) * self.scale)

    def drawn(self, counts: Sequence[int] | None = None) -> Image.Image:
        """All panels, or so many fixations of each."""
        width, height = self.base.size
        top = _TITLE if self.names else 0
        page = Image.new("RGB", ((width + _GAP) * len(self.paths) - _GAP, height + top), "white")
        for n, path in enumerate(self.paths):
            shown = len(path) if counts is None else counts[n]
            colour, left = _COLOURS[n % len(_COLOURS)], n * (width + _GAP)
            page.paste(self._panel(path, shown, colour), (left, top))
            if self.names:
                title = f"{self.names[n]}: {shown} fixation{'' if shown == 1 else 's'}"
                ImageDraw.Draw(page).text((left + 2, top / 2), title, colour, _font(16), "lm")
        return page

    def _panel(self, path: np.ndarray, shown: int, colour: tuple[int, int, int]) -> Image.Image:
        stops, order = _stops(path * (self.scale, self.scale, 1), shown, max(self.base.size) / 40)
        layer = Image.new("RGBA", (self.base.width * _FINE, self.base.height * _FINE))
        draw = ImageDraw.Draw(layer)
        for before, after in pairwise(order):
            _arrow(draw, stops[before], stops[after], colour)
        for n in sorted(range(len(stops)), key=lambda n: -stops[n].radius):  # small ones are not covered by large ones
            _circle(draw, stops[n], colour, is_last=n == order[-1])
        layer = layer.resize(self.base.size, Image.Resampling.BOX)
        return Image.alpha_composite(self.base.convert("RGBA"), layer).convert("RGB")


def _stops(path: np.ndarray, shown: int, radius: float) -> tuple[list[_Stop], list[int]]:
    """The places of a scanpath, and the order in which they were visited, stays apart.

    Args:
        path: x, y, duration, `[T, 3]`, in pixels of the panel.
        shown: how many fixations there are so far; circles are as large as if all were there.
        radius: of an ordinary circle, where there are not too many.
    """
    radius *= min(1.0, math.sqrt(_CROWDED / max(len(path), 1)))
    durations = path[:, 2]
    timed = len(path) > 0 and not np.isnan(durations).any()
    dwell = durations / np.median(durations) if timed else np.ones(len(path))
    places: dict[tuple[float, float], list[int]] = {}
    order: list[int] = []
    for n, (x, y) in enumerate(path[:shown, :2].round(1).tolist()):
        places.setdefault((x, y), []).append(n)
        place = list(places).index((x, y))
        if not order or order[-1] != place:
            order.append(place)
    stops = []
    for (x, y), visits in places.items():
        size = float(np.clip(math.sqrt(dwell[visits].sum()), 0.6, 2.5))
        stops.append(_Stop(x, y, radius * size, _ranges(visits)))
    return stops, order


def _ranges(visits: Sequence[int]) -> str:
    """0, 1, 2, 6 → "1-3,7": fixations count from 1."""
    parts: list[list[int]] = []
    for visit in visits:
        if parts and visit == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], visit]
        else:
            parts.append([visit])
    return ",".join("-".join(str(visit + 1) for visit in part) for part in parts)


def _circle(draw: ImageDraw.ImageDraw, stop: _Stop, colour: tuple[int, int, int], is_last: bool) -> None:
    x, y, radius = stop.x * _FINE, stop.y * _FINE, stop.radius * _FINE
    bounds = (x - radius, y - radius, x + radius, y + radius)
    draw.ellipse(bounds, (*colour, 190), (*(_INK if is_last else (255, 255, 255)), 255), max(2, round(radius / 7)))
    size = min(1.15 * radius, 3.0 * radius / len(stop.label))
    font = _font(max(8 * _FINE, size))
    draw.text((x, y), stop.label, "white", font, "mm", stroke_width=_FINE, stroke_fill=_INK)


def _arrow(draw: ImageDraw.ImageDraw, before: _Stop, after: _Stop, colour: tuple[int, int, int]) -> None:
    """From edge to edge of two circles; nothing where they touch."""
    start, end = np.array([before.x, before.y]) * _FINE, np.array([after.x, after.y]) * _FINE
    length = float(np.linalg.norm(end - start))
    room = length - (before.radius + after.radius) * _FINE
    if room <= 2 * _FINE:
        return
    along = (end - start) / length
    start, end = start + along * before.radius * _FINE, end - along * after.radius * _FINE
    head = min(5.0 * _FINE + 0.25 * after.radius * _FINE, 0.8 * room)
    across, neck = np.array([-along[1], along[0]]), end - along * head
    for shade, extra in (((255, 255, 255), 2 * _FINE), (colour, 0)):
        draw.line((*start, *neck), (*shade, 255), 2 * _FINE + extra)
        side = across * (0.55 * head + extra / 2)
        corners = [end + along * extra / 2, neck + side - along * extra / 2, neck - side - along * extra / 2]
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=(*shade, 255))


def _frame(draw: ImageDraw.ImageDraw, box: np.ndarray) -> None:
    """The target's frame, which is seen on light and dark."""
    left, upper, right, lower = (round(side) for side in box.tolist())
    draw.rectangle((left - 1, upper - 1, right + 1, lower + 1), outline=_INK, width=5)
    draw.rectangle((left, upper, right, lower), outline=_TARGET, width=3)


def _fitted(picture: Image.Image | np.ndarray, longer_side: int) -> tuple[Image.Image, float]:
    """The picture in the size that it is drawn in, and how much larger that is."""
    if longer_side < 64:
        raise ValueError(f"longer_side={longer_side} pixels are too few; give 64 or more.")
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"picture {list(picture.shape)}, {picture.dtype}: expected RGB, [H, W, 3], uint8.")
        picture = Image.fromarray(picture)
    scale = longer_side / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), scale


def _font(size: float) -> Any:
    return ImageFont.load_default(size)
