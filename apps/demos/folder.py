"""The folder of a server's temporary files: emptied of what is old while it runs, gone when it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cleaned", "own_folder"]


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Makes the folder that this process and Gradio keep temporary files in, and removes it with all that it holds.

    It lies in GRADIO_TEMP_DIR where that is set, else where temporary files lie. Enter before Gradio is imported.
    """
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent:
        os.makedirs(parent, exist_ok=True)
    before = tempfile.tempdir
    folder = tempfile.mkdtemp(prefix="attnsuite-demo-", dir=parent or None)
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
    try:
        yield Path(folder)
    finally:
        tempfile.tempdir = before
        if parent is None:
            del os.environ["GRADIO_TEMP_DIR"]
        else:
            os.environ["GRADIO_TEMP_DIR"] = parent
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cleaned(folder: Path, seconds: float) -> Iterator[None]:
    """Removes files from a folder once they are old: uploads, results, and what Gradio leaves of a broken upload.

    What is there already stays: the samples, which every page shows.

    Args:
        folder: Where they are.
        seconds: How old they may get.
    """
    kept = {path for path in folder.rglob("*")}
    ended = threading.Event()

    def clean() -> None:
        while not ended.wait(seconds / 4):
            _remove_old(folder, kept, time.time() - seconds)

    cleaner = threading.Thread(target=clean, name="cleaner", daemon=True)
    cleaner.start()
    try:
        yield
    finally:
        ended.set()
        cleaner.join()


def _remove_old(folder: Path, kept: set[Path], oldest: float) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        # a visitor may write there at this moment
        with contextlib.suppress(OSError):
            if path in kept or path.stat(follow_symlinks=False).st_mtime > oldest:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
