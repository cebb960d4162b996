"""What a training says of itself: a bar, a line an epoch, `log.csv`, and TensorBoard's files on demand."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..console import stderr
from ..errors import UsageError

__all__ = ["Bar", "Board", "log_text", "say_epoch"]


class Bar:
    """A bar over all steps with loss and accuracy so far in the epoch, on stderr while it is a terminal.

    Args:
        total: Steps in all.
        done: Steps that an earlier run has done.
        visible: Whether this process is the one that speaks.
    """

    def __init__(self, total: int, done: int, visible: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=stderr,
            disable=not (visible and stderr.is_terminal),
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, epoch: int, epochs: int, loss: float, top1: float) -> None:
        """One step more is done."""
        text = f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}  top-1 {top1:.1%}"
        self._progress.update(self._task, advance=1, description=text)


def say_epoch(row: dict[str, Any], epochs: int, is_best: bool) -> None:
    """One line on stderr."""
    text = (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.2%}; "
        f"measured: loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2%}" + (", the best so far" if is_best else "")
    )
    stderr.print(text, markup=False)


def log_text(rows: list[dict[str, Any]]) -> str:
    """The rows of all epochs as CSV."""
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file.getvalue()


class Board:
    """TensorBoard's event files.

    Args:
        folder: Where.
        first: Epochs from here on are written anew.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def add(self, row: dict[str, Any]) -> None:
        """Writes the numbers of one epoch."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def require_tensorboard() -> None:
    """Finds out before any work whether it is there.

    Raises:
        UsageError: It is not.
    """
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs TensorBoard: pip install tensorboard; log.csv is written in any case")
