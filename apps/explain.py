"""`attnsuite explain`: where in every image the network looks, as a heat map over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import cv2
import numpy as np
import torch

from vision.explain import Method, attended, heatmap

from .batch.decode import View
from .batch.sources import Source, encode_path
from .batch.stage import Batch, Column, Compute, Row, Stage
from .errors import UsageError
from .models import Network
from .pictures import PictureFolder, write_png

__all__ = ["Explain", "Look", "blend", "class_index", "look"]

_VIEW_SIZE = 768


@dataclass(frozen=True)
class Look:
    """What to draw.

    Attributes:
        method: How the evidence for a class is found, as `vision.explain.heatmap` takes it.
        at: Draw instead where this place attends: x and y, fractions of what the network sees, from the upper left.
        layer: Of which layer of attention, by index or name.
        connectivity: Which places are attended to at all, instead of how much.
    """

    method: Method = "auto"
    at: tuple[float, float] | None = None
    layer: int | str = -1
    connectivity: bool = False


class Explain(Stage):
    """Heat maps for the most likely class, or for one that is asked for.

    Args:
        network: The network with its labels and preprocessing.
        compute: How to run it.
        folder: Where pictures go, under the names of the inputs below `root`.
        root: The deepest folder that holds all inputs.
        target: A class to explain, by index or name; None for the most likely one.
        opacity: How strongly the hottest spot covers the picture, from 0 to 1.
        raw: Also write the bare map as `.npy`.
        look: What to draw.

    Raises:
        UsageError: The network has no such class.
    """

    def __init__(
        self,
        network: Network,
        compute: Compute,
        folder: str,
        root: str,
        target: str | None = None,
        opacity: float = 0.6,
        raw: bool = False,
        look: Look = Look(),
    ) -> None:
        super().__init__(network, compute, _VIEW_SIZE)
        self.target = None if target is None else class_index(network, target)
        self._folder = PictureFolder(folder, root)
        self._opacity = opacity
        self._raw = raw
        self._look = look

    @property
    def columns(self) -> tuple[Column, ...]:
        """`label, prob, heatmap`, and `array` if the bare maps are written."""
        own = (Column("label", "text"), Column("prob", "number"), Column("heatmap", "text"))
        return (*own, Column("array", "text")) if self._raw else own

    def run(self, images: torch.Tensor, batch: Batch, places: Sequence[int]) -> list[Row]:
        """Finds the classes, asks for their maps, and writes one picture an image."""
        labels: list[Row] = [{"label": None, "prob": None}] * len(images)
        targets = None
        if self.network.labels:
            probabilities = self.forward(images).softmax(dim=1)
            targets = probabilities.argmax(dim=1)
            if self.target is not None:
                targets = torch.full_like(targets, self.target)
            chosen = probabilities.gather(1, targets[:, None]).squeeze(1)
            labels = [
                {"label": self.network.labels[index], "prob": round(prob, 6)}
                for index, prob in zip(targets.tolist(), chosen.tolist(), strict=True)
            ]
        try:
            with self.autocast():
                maps = self._maps(images, targets).float().cpu().numpy()
        except ValueError as error:
            raise UsageError(f"{self.network.label} cannot be explained: {error}") from error
        return [
            {**label, **self._written(batch.sources[place], batch.decoded[place].view, heat)}
            for label, place, heat in zip(labels, places, maps, strict=True)
        ]

    def describe(self, row: Row) -> str:
        """Label and where the picture is."""
        label = f"{row['label']} {row['prob']:.1%} " if row["label"] else ""
        return f"{label}→ {row['heatmap']}"

    def _maps(self, images: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        look = self._look
        if look.at is None:
            return heatmap(self.module, images, targets, look.method)
        x, y = look.at
        return attended(self.module, images, (y, x), look.layer, look.connectivity)

    def _written(self, source: Source, view: View | None, heat: np.ndarray) -> Row:
        assert view is not None
        if not np.isfinite(heat).all():
            return {"error": "the heat map holds values that are not numbers; run it without --amp"}

        def draw(base: str) -> Row:
            write_png(f"{base}.png", blend(view, heat, self._opacity))
            row: Row = {"heatmap": encode_path(f"{base}.png")}
            if self._raw:
                np.save(f"{base}.npy", heat.astype(np.float32))
                row["array"] = encode_path(f"{base}.npy")
            return row

        return self._folder.write(source, draw, "heat map")


def look(method: str, at: str | None, layer: str | None, connectivity: bool) -> Look:
    """Reads what to draw from the options of the command.

    Args:
        method: As `Look` has it.
        at: `"0.5,0.25"`, x and y.
        layer: Index or name.
        connectivity: See `Look`.

    Raises:
        UsageError: A place that is none, or an option without the one it belongs to.
    """
    methods: tuple[Method, ...] = get_args(Method)
    if method not in methods:
        raise UsageError(f"--method {method}: expected one of {', '.join(methods)}")
    if at is None:
        if layer is not None or connectivity:
            raise UsageError("--layer and --connectivity say what to draw of a place: give that with --at X,Y")
        return Look(method)
    if method != "auto":
        raise UsageError("--method explains a class, --at shows where a place attends: give one of them")
    try:
        x, y = (float(part) for part in at.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x < 1 and 0 <= y < 1):
        raise UsageError(f"--at {at}: expected X,Y as fractions of the width and height, each from 0 to below 1")
    number = (layer or "-1").removeprefix("-").isdigit()
    return Look(method, (x, y), int(layer or -1) if number else str(layer), connectivity)


def class_index(network: Network, target: str) -> int:
    """The class of that index or name.

    Args:
        network: A network with labels.
        target: `"281"`, `"tabby"` or `"tabby, tabby cat"`.

    Raises:
        UsageError: There is none, or the name fits several.
    """
    labels = network.labels
    if not labels:
        raise UsageError(f"{network.label} has no classes, so there is no --target to choose")
    if target.isdigit():
        if int(target) >= len(labels):
            raise UsageError(f"--target {target}: {network.label} has the classes 0 to {len(labels) - 1}")
        return int(target)
    wanted = target.casefold()
    folded = [label.casefold() for label in labels]
    found = [i for i, label in enumerate(folded) if wanted in (label, *label.split(", "))]
    found = found or [i for i, label in enumerate(folded) if wanted in label]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"--target {target!r} is no class of {network.label}; give its index or its name")
    several = ", ".join(f"{index} ({labels[index]})" for index in found[:5])
    raise UsageError(f"--target {target!r} fits {len(found)} classes: {several}; give the index")


def blend(view: View, heat: np.ndarray, opacity: float, colour_map: int = cv2.COLORMAP_TURBO) -> np.ndarray:
    """Lays a heat map over the part of a picture that the network saw; cold places keep the picture's own colour.

    Args:
        view: The picture and that part of it.
        heat: `(H, W)`, from 0 to 1.
        opacity: Of the hottest places, from 0 to 1.
        colour_map: One of OpenCV's.

    Returns:
        `(height, width, 3)`, uint8, RGB.
    """
    height, width = view.picture.shape[:2]
    left, top, right, bottom = (round(edge) for edge in view.box)
    size = (max(right - left, 1), max(bottom - top, 1))
    grown = cv2.resize(heat.astype(np.float32), size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    field = np.zeros((height, width), np.float32)
    inside = grown[max(-top, 0) : height - top, max(-left, 0) : width - left]
    y, x = max(top, 0), max(left, 0)
    field[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    colours = cv2.applyColorMap((field * 255).astype(np.uint8), colour_map)[..., ::-1]
    cover = (opacity * np.sqrt(field))[..., None]
    return (view.picture * (1 - cover) + colours * cover).round().astype(np.uint8)
