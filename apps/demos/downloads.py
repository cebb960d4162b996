"""What a page hands out as a file: rows as CSV, drawings as SVG, pictures as PNG."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["as_csv", "handed_out", "picture_file"]


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


def picture_file(name: str, picture: np.ndarray) -> str:
    """Writes a picture, `(H, W, 3)`, uint8, as PNG for a download button; see `handed_out`."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return handed_out(name, content.getvalue())


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
