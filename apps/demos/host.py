"""What all pages of the demo share: the settings of this server, its models, and how it speaks of mistakes."""

from __future__ import annotations

import contextlib
import html
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from weights import WeightsError

from ..batch.decode import Unreadable
from ..errors import Stopped, UsageError
from .pool import Pool

__all__ = ["HEAVY", "Host", "Settings", "fetching", "said"]

HEAVY = "models"  # the line of all events that run a model


_LONGEST_NAME = 120
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True)
class Settings:
    """How the server was started.

    Attributes:
        model: The model that the page starts with, where one was named.
        device: Where models run: `"cpu"`, `"cuda"`, `"cuda:1"`.
        max_models: How many are kept in memory at once.
        max_megabytes: Largest file that may be uploaded.
        max_megapixels: Largest picture that is decoded.
        allow_local: Whether `local-dir:FOLDER` may be typed into a page.
        workers: How many requests to models are worked on at once, on all pages together.
    """

    model: str | None = None
    device: str = "cpu"
    max_models: int = 3
    max_megabytes: int = 20
    max_megapixels: int = 50
    allow_local: bool = False
    workers: int = 2


@dataclass(frozen=True)
class Host:
    """The server that pages are drawn for.

    Attributes:
        settings: How it was started.
        pool: The models it has in memory, one copy of each.
    """

    settings: Settings = field(default_factory=Settings)
    pool: Pool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", Pool(self.settings.max_models))

    @property
    def heavy(self) -> dict[str, Any]:
        """Options of every event that runs a model: all of them wait in one line."""
        return {"concurrency_id": HEAVY, "concurrency_limit": self.settings.workers}

    def check_model(self, name: str) -> str:
        """The name, stripped, if a visitor may ask for it.

        Args:
            name: Typed or chosen on a page.

        Raises:
            UsageError: It is empty, or names a folder or an address that only the owner of the server may give.
        """
        name = name.strip()
        if not name:
            raise UsageError("no model is chosen: choose one of the list, or type its name")
        if name == self.settings.model or (self.settings.allow_local and name.startswith("local-dir:")):
            return name
        if name.startswith("local-dir:"):
            raise UsageError("folders of this server are closed: it was started without --allow-local")
        if len(name) > _LONGEST_NAME:
            raise UsageError(f"{name[:20]}…: no model has a name of {len(name)} characters")
        if ":" in name or "/" in name or "\\" in name:
            raise UsageError(f"{name}: expected the name of a registered model, not an address or a file")
        return name


@contextlib.contextmanager
def said() -> Iterator[None]:
    """What goes wrong inside is said on the page, in words; nothing that a visitor does ends in a bare "Error".

    Raises:
        gr.Error: For any mistake; of a defect of ours the log gets the traceback.
    """
    try:
        yield
    except gr.Error:
        raise
    except (UsageError, WeightsError, Stopped, Unreadable) as error:
        raise _shown(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in _OUT_OF_MEMORY):
            raise _defect(error) from error
        raise _shown(
            "there is not enough memory on this server for that: choose a smaller model or picture, or try again when "
            "others are done",
            "Out of memory",
        ) from error
    except Exception as error:
        raise _defect(error) from error


def fetching(label: str, progress: gr.Progress) -> Callable[[int, int | None], None]:
    """Shows how far the weights of a model have come; what `apps.models.load` takes.

    Args:
        label: The model.
        progress: Of the handler that waits for it.
    """

    def told(received: int, total: int | None) -> None:
        share = received / total if total else None
        progress(share, desc=f"Fetching {label}: {received / 1e6:.0f} MB")

    return told


def _shown(message: str, title: str = "That did not work") -> gr.Error:
    message = " ".join(message.split())
    return gr.Error(html.escape(message[:1].upper() + message[1:]), title=title, print_exception=False)


def _defect(error: Exception) -> gr.Error:
    traceback.print_exception(error)
    return _shown(
        f"this is a defect of the demo, not of your input; its log has the details ({type(error).__name__})", "Sorry"
    )
