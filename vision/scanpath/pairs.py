"""Scanpaths as they are given to a metric: checked, padded, in pairs.

A scanpath of objects is `[T]`, one of places `[T, 2]`, or `[T, 3]` with durations. A list of scanpaths is known from a
single one by its depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Pairs", "as_array", "checked_points", "joined", "listed", "paired"]

_TABLE = 1 << 21  # cells of the tables that are worked on at a time


class Pairs(NamedTuple):
    """Pairs of scanpaths, padded, a column for each."""

    a: np.ndarray
    """Objects `[A, P]`, or x, y, duration `[A, P, 3]`."""
    b: np.ndarray
    lengths_a: np.ndarray
    """`[P]`."""
    lengths_b: np.ndarray
    is_single: bool

    @property
    def longer(self) -> np.ndarray:
        return np.maximum(self.lengths_a, self.lengths_b)

    def at(self, index: np.ndarray) -> Pairs:
        """Some of the pairs, as long as the longest of these."""
        lengths_a, lengths_b = self.lengths_a[index], self.lengths_b[index]
        a, b = self.a[: lengths_a.max(initial=0)], self.b[: lengths_b.max(initial=0)]
        return Pairs(a[:, index], b[:, index], lengths_a, lengths_b, self.is_single)

    def mapped(self, compare: Callable[[Pairs], np.ndarray]) -> np.ndarray:
        """A result for each pair, `[..., P]`, of parts that are small enough and of similar lengths."""
        results = [(index, compare(self.at(index))) for index in self._parts()]
        order = np.concatenate([index for index, _ in results])
        return np.concatenate([values for _, values in results], -1)[..., np.argsort(order)]

    def _parts(self) -> Iterator[np.ndarray]:
        order = np.argsort(-self.longer, kind="stable")
        start = 0
        while start < max(1, len(order)):  # one part even of nothing
            longest = int(self.longer[order[start:]].max(initial=0))
            stop = start + max(1, _TABLE // (longest + 1) ** 2)
            yield order[start:stop]
            start = stop

    def result(self, values: np.ndarray) -> Any:
        return float(values[0]) if self.is_single else values


def paired(a: Any, b: Any, dim: int) -> Pairs:
    """Scanpaths of both sides: objects (`dim=1`) or points (`dim=2`)."""
    (many_a, single_a), (many_b, single_b) = listed(a, dim), listed(b, dim)
    if not single_a and not single_b and len(many_a) != len(many_b):
        raise ValueError(f"{len(many_a)} scanpaths and {len(many_b)}: expected one for each other, or one for all.")
    padded_a, lengths_a = _padded(many_a, dim)
    padded_b, lengths_b = _padded(many_b, dim)
    if single_a:
        padded_a, lengths_a = padded_a.repeat(len(many_b), 1), lengths_a.repeat(len(many_b))
    elif single_b:
        padded_b, lengths_b = padded_b.repeat(len(many_a), 1), lengths_b.repeat(len(many_a))
    return Pairs(padded_a, padded_b, lengths_a, lengths_b, single_a and single_b)


def listed(scanpaths: Any, dim: int) -> tuple[list[Any], bool]:
    """A list of scanpaths, and whether there was only one, which is known by its depth."""
    depth = _depth(scanpaths)
    if depth == 0:
        raise TypeError(f"expected a scanpath or a list of scanpaths, got {type(scanpaths).__name__}.")
    if depth == dim or (depth < dim and len(scanpaths) == 0):
        return [scanpaths], True
    if depth == dim + 1 or all(_is_empty(path) for path in scanpaths):
        return list(scanpaths), False
    raise ValueError(
        f"a scanpath of {'objects, [T]' if dim == 1 else 'places, [T, 2]'}, or a list of such, was expected; "
        f"got something of {depth} dimensions. Fixations in pixels become objects by `Objects.at`."
    )


def _depth(value: Any) -> int:
    """Dimensions of nested sequences and arrays, as far as something is in them."""
    if hasattr(value, "ndim"):
        return value.ndim
    if isinstance(value, str) or not isinstance(value, Sequence):
        return 0
    depths = (_depth(inner) for inner in value if not _is_empty(inner))
    return 1 + next(depths, len(value) > 0)


def _is_empty(value: Any) -> bool:
    return getattr(value, "ndim", 1) > 0 and hasattr(value, "__len__") and len(value) == 0


def joined(paths: Sequence[Any], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks scanpaths and lays them end to end.

    Args:
        paths: scanpaths.
        dim: 1 of objects, 2 of places.

    Returns:
        Objects `[sum of T]`, int64, or places with durations `[sum of T, 3]`, float64; and lengths, `[P]`.

    Raises:
        TypeError: objects that are not integers.
        ValueError: another shape, negative objects, coordinates that are not finite, durations that are not positive.
    """
    check = _checked_objects if dim == 1 else checked_points
    arrays = [check(path, f"scanpath {n}" if len(paths) > 1 else "scanpath") for n, path in enumerate(paths)]
    lengths = np.array([len(path) for path in arrays], np.intp)
    return np.concatenate([check([], "nothing"), *arrays]), lengths


def _padded(paths: Sequence[Any], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Scanpaths as columns of an array, `[T, P]` or `[T, P, 3]`, and their lengths."""
    values, lengths = joined(paths, dim)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [P, T]
    padded = np.zeros((*mask.shape, *values.shape[1:]), values.dtype)
    padded[mask] = values
    return np.ascontiguousarray(padded.swapaxes(0, 1)), lengths


def _checked_objects(path: Any, what: str) -> np.ndarray:
    ids = np.asarray(as_array(path))
    if not ids.size:
        return np.zeros(0, np.int64)
    if ids.ndim != 1:
        raise ValueError(f"{what}: expected objects, [T], got an array {list(ids.shape)}.")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{what}: expected objects as integers, got {ids.dtype}; `Objects.at` makes them of pixels.")
    if ids.min() < 0:
        raise ValueError(f"{what}: object {ids.min()}: objects count from 0; cut the padding off.")
    return ids.astype(np.int64, copy=False)


def checked_points(path: Any, what: str) -> np.ndarray:
    """`[T, 3]`: x, y, and durations, which are not a number where there are none."""
    points = np.asarray(as_array(path), float)
    if not points.size:
        return np.zeros((0, 3))
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"{what}: expected places [T, 2], or [T, 3] with durations, got {list(points.shape)}.")
    if not np.isfinite(points).all():
        bad = int(np.flatnonzero(~np.isfinite(points).all(1))[0])
        raise ValueError(f"{what}: number {bad} is {points[bad].tolist()}; leave lost samples out.")
    if points.shape[1] == 2:
        return np.column_stack((points, np.full(len(points), np.nan)))
    if points[:, 2].min() <= 0:
        raise ValueError(f"{what}: duration {points[:, 2].min()} is not positive; leave the third column out.")
    return points


def as_array(value: Any) -> Any:
    """Tensors of any device and dtype as arrays; all else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.double() if value.is_floating_point() else value).numpy()  # NumPy knows no bfloat16
