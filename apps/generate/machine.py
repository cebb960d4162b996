"""What `attnsuite generate` needs of the machine: quiet libraries, the same result each time, enough memory."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any, Literal

import torch

from ..console import RunReport
from ..errors import Stopped

__all__ = ["Notes", "calm", "hushed", "machine", "out_of_memory", "repeatable", "usual_dtype"]


def machine(device: torch.device) -> dict[str, str]:
    """What the last digits of a picture may depend on."""
    versions = {name: metadata.version(name) for name in ("attnsuite", "torch", "diffusers", "transformers")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {**versions, "device": f"{device.type} ({name})"}


def usual_dtype(device: torch.device) -> Literal["float16", "float32"]:
    """In which networks compute on a device if nobody says otherwise."""
    return "float16" if device.type == "cuda" else "float32"


class Notes(RunReport):
    """Notes on stderr, each once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def note(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            super().note(message)


@contextlib.contextmanager
def calm(report: Notes) -> Iterator[None]:
    """The libraries draw no bars of their own, and what Python code warns of is a note."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category in (UserWarning, RuntimeWarning):
            report.note(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message=".*deterministic")
        warnings.showwarning = show
        try:
            for library in (of_diffusers, of_transformers):
                library.disable_progress_bar()
            yield
        finally:
            for library in (of_diffusers, of_transformers):
                library.enable_progress_bar()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """What the libraries log of a prompt that is too long is not shown; the verb says it once and in its own words."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    before = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    try:
        for library, _ in before:
            library.set_verbosity_error()
        yield
    finally:
        for library, level in before:
            library.set_verbosity(level)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, kernels that give the same each time where torch has them; those of a CPU do."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextlib.contextmanager
def out_of_memory(output: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in str(error) for s in signs):
            raise
        raise Stopped(
            "out of memory: lower --height and --width, use --dtype bfloat16 (float16 on a GPU), or guide no step with "
            f"--guidance-steps 0. Pictures in {output} are whole; the same command goes on"
        ) from error
