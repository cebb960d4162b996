"""What of the processor and of the C library decides how fast a network runs on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import platform

__all__ = ["WORKERS_SPARE", "give_back_freed_memory", "has_bfloat16", "keep_freed_memory"]

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_ALL = 2**31 - 1
_USUAL_MAPS = 65_536
_LARGEST_THRESHOLD = 32 << 20  # older versions refuse more

# What a decode process may keep: enough for the next photograph, little enough that one huge picture is not held on to.
WORKERS_SPARE = 128 << 20


def keep_freed_memory(spare: int | None = None) -> None:
    """Has glibc keep what is freed for what is asked for next, in this process and those forked from it.

    Left to itself it gives every large tensor back to the system and gets it anew for the next layer, and the system
    clears each page again: for networks of many light layers that takes longer than the arithmetic.

    Args:
        spare: Bytes that may be kept; None for all, so that the process stays as large as it ever was.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, _ALL if spare is None else spare)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_MMAP_MAX, 0 if spare is None else _USUAL_MAPS)


def give_back_freed_memory() -> None:
    """Has glibc give back what it keeps: for when memory has run out."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def has_bfloat16() -> bool:
    """Whether this processor computes with bfloat16; one of x86 that does not converts every number there and back."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
