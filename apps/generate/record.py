"""What a generated picture says of itself: plain JSON in a text chunk of the PNG, enough to draw it again.

Pictures are passed around, so what one says is not trusted: it is read as text, every value is checked, and no model is
fetched because a picture names it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from ..errors import UsageError
from .settings import Settings

__all__ = ["CHUNK", "Record", "read", "replaced", "write"]

CHUNK = "attnsuite"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Of one picture.

    Attributes:
        settings: What it was drawn with.
        identity: A digest of the model's files.
        machine: Versions and the device, which the last digits depend on.
        losses: Of its attention maps, averaged over the steps.
        compare: Whether it is a plain picture and a guided one side by side.
    """

    settings: Settings
    identity: str
    machine: Mapping[str, str]
    losses: Mapping[str, float | None] = field(default_factory=dict)
    compare: bool = False

    def as_text(self) -> str:
        """As it stands in the picture: JSON in ASCII."""
        return json.dumps(
            {
                CHUNK: _FORMAT,
                "settings": self.settings.as_json(),
                "model_digest": self.identity,
                "machine": dict(self.machine),
                "losses": dict(self.losses),
                "compare": self.compare,
            }
        )

    @classmethod
    def from_text(cls, text: str) -> Record:
        """Reads `as_text`.

        Raises:
            UsageError: It is something else.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError("its settings are no JSON") from error
        if not isinstance(found, dict) or found.get(CHUNK) != _FORMAT:
            raise UsageError("its settings are of another version of attnsuite")
        identity, compare = found.get("model_digest"), found.get("compare")
        if not isinstance(identity, str) or not isinstance(compare, bool):
            raise UsageError("its settings lack model_digest or compare")
        machine, losses = (_dictionary(found, name) for name in ("machine", "losses"))
        if not all(isinstance(value, str) for value in machine.values()):
            raise UsageError("its settings hold a machine that is no text")
        if not all(value is None or _is_finite(value) for value in losses.values()):
            raise UsageError("its settings hold losses that are no numbers")
        return cls(Settings.from_json(found.get("settings")), identity, machine, losses, compare)


def write(path: Path, picture: Image.Image, record: Record) -> None:
    """Writes a picture with its record; the file appears whole or not at all."""
    info = PngImagePlugin.PngInfo()
    info.add_text(CHUNK, record.as_text())
    replaced(path, lambda part: picture.save(part, "PNG", pnginfo=info))


def replaced(path: Path, write: Callable[[Path], Any]) -> None:
    """Has a file written beside its place and moves it in."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[Record, np.ndarray]:
    """The record of a picture and its pixels, `(height, width, 3)`, uint8.

    Raises:
        UsageError: There is no such file, it is no PNG, or says nothing or nonsense of its making.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            text = picture.text.get(CHUNK)  # type: ignore[attr-defined]
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as a PNG: {str(error).splitlines()[0]}") from error
    if text is None:
        raise UsageError(
            f"{path} does not say how it was made: only pictures of `attnsuite generate` do, as long as no other "
            "program has written them anew"
        )
    try:
        return Record.from_text(text), pixels
    except UsageError as error:
        raise UsageError(f"{path} cannot be repeated: {error}") from error


def _dictionary(found: dict[str, Any], name: str) -> dict[str, Any]:
    value = found.get(name)
    if not isinstance(value, dict):
        raise UsageError(f"its settings lack {name}")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
