"""What a training leaves on disk: folders that can be classified with, and the state that it goes on from.

Every file appears whole or not at all: it is written beside its place, brought to the disk and renamed. The state is
one file, so that no two parts of it are of different steps; all else follows from it and is written again after a kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Stopped, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LOG", "VAL", "Folder", "Record", "differences", "replace_file", "save_network"]

SETTINGS, STATE, LOG, VAL, LOCK = "settings.json", "state.pt", "log.csv", "val.csv", ".lock"
_FORMAT = 1
_BESIDE = ".new"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in its place in one step.

    Args:
        path: Where.
        write: Writes it to the path it is given.

    Raises:
        Stopped: The disk is full, or the folder is gone.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk by the latter
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = getattr(error, "strerror", None) or error
        raise Stopped(f"cannot write {path}: {reason}; the same command goes on from the last checkpoint") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_network(
    module: nn.Module, folder: Path, classes: Sequence[str], data_config: dict[str, Any], trained: dict[str, Any]
) -> None:
    """Writes a network as timm's `local-dir:` folder, its labels inside.

    Args:
        module: The network.
        folder: Where; files that are there are replaced one by one, weights last.
        classes: Names of the classes.
        data_config: timm's description of the input.
        trained: What is to be known of it, kept in its `config.json` under `trained`.
    """
    from timm.models import save_for_hf

    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_BESIDE, dir=folder.parent) as made:
        kept = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        save_for_hf(
            module,
            made,
            safe_serialization=True,
            model_config={"label_names": list(classes), "trained": trained},
            data_config={name: data_config[name] for name in kept if name in data_config},
        )
        for name in ("config.json", "model.safetensors"):
            (Path(made) / name).chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
            replace_file(folder / name, (Path(made) / name).rename)


@dataclass(frozen=True)
class Record:
    """What `settings.json` holds.

    Attributes:
        settings: What the run depends on.
        left_out: Names of pictures that cannot be read, and why.
    """

    settings: dict[str, Any]
    left_out: dict[str, str]


class Folder:
    """The folder of one training; while it is open for writing, no other process can open it.

    Args:
        path: The folder.
        writes: Whether this process writes; the others of a run only read.

    Raises:
        UsageError: It cannot be written to, holds something else, or another training is at it.
    """

    def __init__(self, path: str, writes: bool) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._is_new = not self.path.exists()
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write to the folder {path}: {error.strerror}") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(f"another training is at {path} right now; wait for it or choose another -o") from error
        if not self._file(SETTINGS).exists() and (others := self._others()):
            self.close()
            raise UsageError(f"{path} holds something else, such as {others[0]}; choose another -o")

        for left in self.path.glob(f"{_BESIDE}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Lets other trainings have it."""
        if self._lock is not None:
            if not self._file(SETTINGS).exists():
                with contextlib.suppress(OSError):
                    self._file(LOCK).unlink()
                    if self._is_new:
                        self.path.rmdir()
            os.close(self._lock)
            self._lock = None

    def _file(self, name: str) -> Path:
        return self.path / name

    def _others(self) -> list[str]:
        # what begins with a dot may be left of a run that was killed at its first file
        return sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))

    def clear(self) -> None:
        """Forgets a run; what it left is overwritten by the next."""
        for name in (STATE, SETTINGS, LOG, VAL):
            self._file(name).unlink(missing_ok=True)

    def record(self) -> Record | None:
        """The settings of the run that is here, or None.

        Raises:
            UsageError: They cannot be read.
        """
        try:
            content = json.loads(self._file(SETTINGS).read_text(encoding="utf-8"))
            return Record(content["settings"], content["left_out"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self._file(SETTINGS)} cannot be read; --overwrite begins anew") from error

    def begin(self, record: Record) -> None:
        """Writes the settings of a new run."""
        content = {"attnsuite train": _FORMAT, "settings": record.settings, "left_out": record.left_out}
        text = json.dumps(content, indent=1) + "\n"
        self.write(SETTINGS, text)

    def has_state(self) -> bool:
        """Whether a run has come to its first checkpoint."""
        return self._file(STATE).exists()

    def save_state(self, state: dict[str, Any]) -> None:
        """Writes what the run goes on from."""
        import torch

        replace_file(self._file(STATE), lambda path: torch.save({"format": _FORMAT, **state}, path))

    def load_state(self) -> dict[str, Any] | None:
        """Reads it; None if there is none.

        Raises:
            UsageError: It is damaged, or of another version.
        """
        import torch

        if not self.has_state():
            return None
        try:
            state = torch.load(self._file(STATE), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch makes of a damaged file
            raise UsageError(f"{self._file(STATE)} cannot be read ({error}); --overwrite begins anew") from error
        if state.get("format") != _FORMAT:
            raise UsageError(f"{self._file(STATE)} is of another version; --overwrite begins anew")
        return state

    def write(self, name: str, text: str) -> None:
        """Writes a whole file of text."""
        replace_file(self._file(name), lambda path: path.write_text(text, encoding="utf-8"))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two settings differ in, in words."""
    names = dict.fromkeys([*now, *before])
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
    ]
