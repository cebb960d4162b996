"""Regions of a picture, painted in the browser or written as numbers: the editor, and the masks that come of it."""

from __future__ import annotations

import base64
import io
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs, EditorData
from PIL import Image

from ..errors import UsageError
from .downloads import as_png

__all__ = ["COLOURS", "Layers", "editor", "regions"]

COLOURS = {"orange": "#e69f00", "blue": "#56b4e9", "green": "#009e73", "pink": "#cc79a7"}
"""Of Okabe and Ito's set, by name."""

Layers = Sequence["bytes | str"]
"""What was painted: files, or what they hold."""

_SIDE = 256
_MOST_SIDE = 1024
_MOST_LAYERS, _MOST_BYTES, _MOST_AHEAD = 4, 500_000, 32
_SOFT_EDGE = 0.002  # of the picture: less of a colour is the seam between two others
_EXAMPLE = '{"circle": [0, 0, 0.5, 1]}'


class _Ahead:
    """Layers that browsers send ahead of the event that they belong to: few and small, the oldest dropped first.

    Gradio would hold as many as are sent, of any size, until an event asks for them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[str, dict[int, bytes]] = OrderedDict()

    def keep(self, name: str, number: int | None, layer: bytes) -> None:
        with self._lock:
            layers = self._held.setdefault(name, {})
            if number is not None and 0 <= number < _MOST_LAYERS and len(layer) <= _MOST_BYTES:
                layers[number] = layer
            while len(self._held) > _MOST_AHEAD:
                self._held.popitem(last=False)

    def take(self, name: str) -> list[bytes]:
        with self._lock:
            layers = self._held.pop(name, None)
        if layers is None:
            raise gr.Error("The painted regions did not arrive: try again.", print_exception=False)
        return [layers[number] for number in sorted(layers)]


def editor(label: str, **options: Any) -> gr.ImageEditor:
    """A sheet to paint on in `COLOURS`, which reaches its handler as `Layers`, unopened.

    `gr.ImageEditor` would decode first and ask later, whatever the size. (A class of our own would make Gradio write a
    stub file beside this one.)

    Args:
        label: Of the control.
        **options: Of `gr.ImageEditor`.
    """
    colours = [*COLOURS.values()]
    sheet = gr.ImageEditor(
        np.full((_SIDE, _SIDE, 3), 255, np.uint8), label=label, type="filepath", sources=(), transforms=(),
        layers=False, canvas_size=(_SIDE, _SIDE), fixed_canvas=True,
        brush=gr.Brush(default_size=40, colors=list(colours), default_color=colours[0], color_mode="fixed"), **options,
    )  # fmt: skip
    ahead = _Ahead()

    @server
    def accept_blobs(data: AcceptBlobs) -> None:
        number = str(data.data["index"])
        layer = data.files[0][1] if data.data["type"] == "layer" else b""
        ahead.keep(str(data.data["id"]), int(number) if number.isdecimal() and len(number) < 4 else None, layer)

    def layers_of(payload: EditorData | None) -> Layers:
        if payload is None:
            return []
        return ahead.take(payload.id) if payload.id is not None else [layer.path for layer in payload.layers if layer]

    setattr(sheet, "accept_blobs", accept_blobs)  # noqa: B010 - of this one
    setattr(sheet, "preprocess", layers_of)  # noqa: B010
    return sheet


def regions(painted: Layers | None, subjects: Sequence[str], text: str = "") -> dict[str, Any]:
    """Places of subjects, painted or written; what is painted takes precedence.

    Args:
        painted: Layers, later ones over earlier ones.
        subjects: The first has the first of `COLOURS`.
        text: JSON, `{"circle": [left, top, right, bottom]}` in fractions of the picture; nothing for none.

    Returns:
        For each subject that has one its place, as `apps.generate.settings.Settings` takes it.

    Raises:
        UsageError: Something cannot be read, is empty, or belongs to no subject.
    """
    places: dict[str, Any] = {}
    for name, box in _written(text).items():
        if name not in subjects:
            raise UsageError(f"a region is written for {name!r}, which is none of the subjects {', '.join(subjects)}")
        places[name] = _box(name, box)
    painted = painted or []
    if len(painted) > _MOST_LAYERS:
        raise UsageError(f"the painted regions have {len(painted)} layers: at most {_MOST_LAYERS} are taken")
    for number, mask in enumerate(_masks([_read(layer) for layer in painted])):
        if mask.mean() < _SOFT_EDGE:
            continue
        if number >= len(subjects):
            few = f"there are only {len(subjects)} subjects" if subjects else "there is no subject"
            raise UsageError(f"a region is painted in {[*COLOURS][number]}, the colour of subject {number + 1}: {few}")
        places[subjects[number]] = base64.b64encode(as_png((mask * 255).astype(np.uint8))).decode()
    return places


def _written(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        places = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the regions are no JSON: expected such as {_EXAMPLE}") from error
    if not isinstance(places, dict):
        raise UsageError(f"the regions: expected an object such as {_EXAMPLE}")
    return places


def _box(name: str, box: Any) -> tuple[float, ...]:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise UsageError(
            f"the region of {name!r} is empty or no region: expected left, top, right and bottom from 0 to 1, such as "
            f"{_EXAMPLE}"
        )
    return tuple(box)


def _read(layer: bytes | str) -> np.ndarray:
    """A layer as `(H, W, 4)`, uint8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(layer) if isinstance(layer, bytes) else layer) as image:
                if max(image.size) > _MOST_SIDE:
                    size = f"{image.width} × {image.height}"
                    raise UsageError(f"the painted regions have {size} pixels: at most {_MOST_SIDE} a side are taken")
                return np.asarray(image.convert("RGBA"))
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # Pillow passes on whatever its decoders raise
        raise UsageError("the painted regions are no picture that can be read: paint them anew") from error


def _masks(layers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Where each colour was painted, later layers over earlier ones, `(H, W)`, bool."""
    if len({layer.shape for layer in layers}) > 1:
        raise UsageError("the layers of the painted regions differ in size")
    palette = np.array([[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in COLOURS.values()], np.float32)
    chosen = np.full(layers[0].shape[:2] if layers else (1, 1), -1)
    for layer in layers:
        distance = ((layer[..., None, :3].astype(np.float32) - palette) ** 2).sum(-1)  # [H, W, colours]
        chosen = np.where(layer[..., 3] > 127, distance.argmin(-1), chosen)
    return [chosen == number for number in range(len(palette))]
