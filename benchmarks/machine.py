"""What a figure was measured on: the processor, and the versions of what ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import torch

__all__ = ["describe", "peak_mb", "processor"]


def processor() -> str:
    """Name, cores and vector instructions of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def describe(*packages: str) -> dict[str, object]:
    """The processor, the day, and the versions of packages, by the names under which they are installed."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": processor(), "date": time.strftime("%Y-%m-%d"), "versions": versions}


def peak_mb() -> float:
    """The most memory that this process held so far.

    Not getrusage's maximum, which a child inherits from the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
