"""`attnsuite segment`: the class of every pixel, as a map in the picture's own size and as colours laid over it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image

from .batch.decode import Decoder, Framing, View
from .batch.sources import encode_path
from .batch.stage import Batch, Column, Compute, Row, Stage
from .errors import UsageError
from .models import Network
from .pictures import PictureFolder, write_png

__all__ = ["Segment", "read_scales", "segmenters"]

_VIEW_SIZE = 1024
_MAX_CLASSES = 256  # of a picture with a palette


class Segment(Stage):
    """A map of classes for each picture; pictures differ in size, so a batch is one picture.

    Args:
        network: A segmentation network (`vision.segmentation.Segmenter`) with its labels and preprocessing.
        compute: How to run it.
        folder: Where pictures go, under the names of the inputs below `root`.
        root: The deepest folder that holds all inputs.
        size: Longest side that the network gets to see; None for that of the pictures it was trained on.
        scales: Sizes that are combined, as factors; None for the network's own.
        opacity: How strongly the colours cover the picture, from 0 to 1.

    Raises:
        UsageError: The network gives no class to each pixel, or has more classes than a palette has colours.
    """

    segments = True

    def __init__(
        self,
        network: Network,
        compute: Compute,
        folder: str,
        root: str,
        size: int | None = None,
        scales: Sequence[float] | None = None,
        opacity: float = 0.5,
    ) -> None:
        from vision.segmentation import Segmenter, palette

        if not isinstance(network.module, Segmenter):
            raise UsageError(f"{network.label} does not segment; models that do: {', '.join(segmenters())}")
        if not 0 < len(network.labels) <= _MAX_CLASSES:
            raise UsageError(f"{network.label} has {len(network.labels)} classes; a map of classes holds 1 to 256")
        channels, *trained = network.data_config["input_size"]
        decoder = _decoder(channels, size or max(trained), network.data_config["interpolation"])
        super().__init__(network, compute, decoder=decoder)
        self._segmenter = network.module
        self._folder = PictureFolder(folder, root)
        self._scales = scales
        self._opacity = opacity
        self._palette = np.array(palette(network.labels), np.uint8)

    @property
    def columns(self) -> tuple[Column, ...]:
        """`label, share, classes, classmap, overlay`."""
        shares = (Column("label", "text"), Column("share", "number"), Column("classes", "text"))
        return (*shares, Column("classmap", "text"), Column("overlay", "text"))

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Segments, and writes two pictures an image."""
        logits = self.forward(images, lambda x: self._segmenter.predict(x, self._scales))
        return [self._row(batch, place, scores) for place, scores in zip(places, logits, strict=True)]

    def describe(self, row: Row) -> str:
        """The largest classes and where the map is."""
        largest = list(json.loads(row["classes"]).items())[:3]
        return f"{', '.join(f'{name} {share:.0%}' for name, share in largest)} → {row['classmap']}"

    def _row(self, batch: Batch, place: int, scores: torch.Tensor) -> Row:
        decoded = batch.decoded[place]
        assert decoded.height and decoded.width and decoded.view
        if not scores.isfinite().all():
            return {"error": "the network gives values that are not numbers; run it without --amp"}
        classes = _largest(scores, (decoded.height, decoded.width)).cpu().numpy()
        counts = np.bincount(classes.ravel(), minlength=len(self.network.labels))
        order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        shares = {self.network.labels[index]: round(counts[index] / classes.size, 6) for index in order}
        view = decoded.view

        def draw(base: str) -> Row:
            indexed = Image.fromarray(classes)
            indexed.putpalette(self._palette.tobytes())
            indexed.save(f"{base}.classes.png")
            write_png(f"{base}.overlay.png", self._overlay(view, classes))
            names = {"classmap": f"{base}.classes.png", "overlay": f"{base}.overlay.png"}
            return {column: encode_path(name) for column, name in names.items()}

        label = self.network.labels[order[0]]
        found: Row = {"label": label, "share": shares[label], "classes": json.dumps(shares, ensure_ascii=False)}
        return found | self._folder.write(batch.sources[place], draw, "map of classes")

    def _overlay(self, view: View, classes: np.ndarray) -> np.ndarray:
        height, width = view.picture.shape[:2]
        small = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
        covered = view.picture * (1 - self._opacity) + self._palette[small] * self._opacity
        return covered.round().astype(np.uint8)


def segmenters() -> list[str]:
    """Names of the registered networks that give a class to each pixel."""
    import timm

    import attnsuite  # noqa: F401 - registers our models
    from vision.segmentation import Segmenter

    entries = {name: timm.model_entrypoint(name) for name in timm.list_models()}
    ours = {name: entry for name, entry in entries.items() if entry.__module__.partition(".")[0] == "vision"}
    kinds: dict[str, Any] = {name: get_type_hints(entry).get("return") for name, entry in ours.items()}
    return [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Segmenter)]


def read_scales(text: str | None) -> tuple[float, ...] | None:
    """Reads `"0.5,1,2"`.

    Raises:
        UsageError: Not a list of factors from 0.1 to 4.
    """
    if text is None:
        return None
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = ()
    if not scales or not all(0.1 <= scale <= 4 for scale in scales) or len(set(scales)) < len(scales):
        raise UsageError(f"--scales {text!r}: expected different factors from 0.1 to 4, such as 0.5,1,2")
    return scales


@dataclass(frozen=True)
class _Bounded:
    """A picture at its own resolution, made smaller where its longest side is above `longest`."""

    longest: int
    filter: Image.Resampling

    def __call__(self, image: Image.Image) -> np.ndarray:
        """To `(C, H, W)`, uint8."""
        scale = self.longest / max(image.size)
        if scale < 1:
            width, height = (max(round(side * scale), 1) for side in image.size)
            image = image.resize((width, height), self.filter)
        pixels = np.asarray(image)
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _decoder(channels: int, longest: int, interpolation: str) -> Decoder:
    resampling = getattr(Image.Resampling, interpolation.upper(), Image.Resampling.BILINEAR)
    everything = Framing((longest, longest), 1.0, "squash")
    return Decoder(_Bounded(longest, resampling), everything, channels, _VIEW_SIZE, keep_strips=True)


def _largest(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scores `[K, h, w]` to the best class of each pixel, `[*size]`, uint8.

    Class by class where they have to grow: all of them at the size of a photograph would take gigabytes.
    """
    from vision.segmentation import resize_maps

    if scores.shape[1:] == size:
        return scores.argmax(0).byte()
    best = torch.full(size, -torch.inf, device=scores.device)
    classes = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for index, plane in enumerate(scores):
        grown = resize_maps(plane[None, None], size)[0, 0]
        classes.masked_fill_(grown > best, index)
        torch.maximum(best, grown, out=best)
    return classes
