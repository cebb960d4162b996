"""Text that a page hands out as a file: rows as CSV, drawings as SVG."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["as_csv", "handed_out"]


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


def handed_out(name: str, text: str) -> str:
    """Writes a file for a download button, where Gradio serves it and removes it after a while.

    The same text is written to the same place, so that visitors who press a button again and again fill no disk.

    Args:
        name: Of the file, with suffix.
        text: What it holds.

    Returns:
        Its path.
    """
    root = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    # two visitors may ask at once: neither may read what the other has half written
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(file.name, folder / name)
    return str(folder / name)
