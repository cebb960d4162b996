"""Pictures that a verb draws: where they go, and what to do about a name that cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from .batch.sources import Source
from .batch.stage import Row
from .errors import UsageError

__all__ = ["PictureFolder", "rows_file", "write_png"]

# A name that cannot be written is one input's problem; anything else (a full disk, no permission) is the run's.
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ)


@dataclass(frozen=True)
class PictureFolder:
    """A folder that mirrors the inputs.

    Attributes:
        folder: Where pictures go, under the names of the inputs below `root`.
        root: The deepest folder that holds all inputs.
    """

    folder: str
    root: str

    def write(self, source: Source, draw: Callable[[str], Row], what: str) -> Row:
        """Has the pictures of one input written.

        Args:
            source: The input.
            draw: Writes files whose names begin with the path that it is given, and says their columns.
            what: What they are, for the message.

        Returns:
            What `draw` returned; a row with an `error` if the files cannot have such a name.
        """
        base = os.path.join(self.folder, _relative(source, self.root))
        try:
            os.makedirs(os.path.dirname(base), exist_ok=True)
            return draw(base)
        except OSError as error:
            if error.errno not in _NAME_ERRORS:
                raise
            return {"error": f"cannot write the {what}: {error.strerror}"}


def rows_file(folder: str) -> str:
    """Makes the output folder and names the file of rows in it.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output folder {folder}: {error.strerror}") from error
    return os.path.join(folder, "rows.jsonl")


def write_png(path: str, picture: np.ndarray) -> None:
    """Writes a picture, `(height, width, 3)`, uint8, RGB."""
    done, content = cv2.imencode(".png", picture[..., ::-1])
    assert done
    with open(path, "wb") as file:
        file.write(content.tobytes())


def _relative(source: Source, root: str) -> str:
    """Where an input lies below the root, in a form that cannot lead out of an output folder."""
    name = os.path.relpath(os.path.abspath(source.path), root)
    if source.member is not None:
        name = os.path.join(name, source.member)
    return os.path.join(*("__" if part == os.pardir else part for part in name.split(os.sep) if part not in ("", ".")))
