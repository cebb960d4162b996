"""What a page hands out: rows as CSV, drawings as SVG, pictures as PNG, several as ZIP, or within the page."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["as_csv", "as_png", "as_zip", "handed_out", "within_html"]


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; lists are joined by spaces, None is left empty.

    Args:
        rows: All with the same keys.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
        )
    return text.getvalue()


def as_png(picture: np.ndarray | Image.Image) -> bytes:
    """A picture as PNG; an array is `(H, W, 3)`, or `(H, W)` for grey, uint8."""
    content = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(content, "PNG")
    return content.getvalue()


def within_html(picture: Image.Image) -> str:
    """A picture as the `src` of an `img`: it comes with the page, and no file of it is served."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def as_zip(files: Mapping[str, bytes]) -> bytes:
    """Files by name as an archive, without the time: the same files make the same archive."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, what in files.items():
            archive.writestr(zipfile.ZipInfo(name), what)
    return content.getvalue()


def handed_out(name: str, content: str | bytes) -> str:
    """Writes a file for a download button, where Gradio serves it and removes it after a while.

    The same content is written to the same place, so that visitors who press a button again and again fill no disk.

    Args:
        name: Of the file, with suffix.
        content: What it holds.

    Returns:
        Its path.
    """
    root = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
    content = content.encode() if isinstance(content, str) else content
    folder = root / hashlib.sha256(content).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    # two visitors may ask at once: neither may read what the other has half written
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(content)
    os.replace(file.name, folder / name)
    return str(folder / name)
