"""Alignment of sequences by dynamic programming, for many pairs at once.

Both functions walk along the anti-diagonals of the tables of all pairs together. Cells of one anti-diagonal do not
depend on each other, so that a step is a few array operations, and the number of steps is the sum of two lengths.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["align", "cheapest_path"]


def align(
    a: np.ndarray,
    b: np.ndarray,
    lengths_a: np.ndarray,
    lengths_b: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    gap: float,
) -> np.ndarray:
    """The score of the best global alignment of each pair (Needleman and Wunsch, 1970).

    Args:
        a: elements of the first sequences, `[A, P]`, a column for each pair; what lies beyond a length is padding.
        b: of the second ones, `[B, P]`.
        lengths_a: of the first sequences, `[P]`.
        lengths_b: of the second ones, `[P]`.
        score: what it is worth to align elements with elements, of arrays of one shape.
        gap: what it is worth to leave an element out, at the ends as well.

    Returns:
        `[P]`, float64.
    """
    (longest_a, pairs), longest_b = a.shape, b.shape[0]
    ends = lengths_a + lengths_b
    result = np.zeros(pairs)
    # `now[i]`: best score of the first i elements of a with the first d-i of b.
    # `last` and `before`: the same of the diagonals d-1 and d-2.
    before = last = np.zeros((longest_a + 1, pairs))
    for d in range(1, int(ends.max(initial=0)) + 1):
        now = np.empty_like(last)
        now[0] = gap * d
        if d <= longest_a:
            now[d] = gap * d
        low, high = max(1, d - longest_b), min(longest_a, d - 1)
        if low <= high:
            rows, columns = slice(low - 1, high), slice(d - high - 1, d - low)
            aligned = before[low - 1 : high] + score(a[rows], b[columns][::-1])
            skipped = np.maximum(last[low - 1 : high], last[low : high + 1]) + gap
            now[low : high + 1] = np.maximum(aligned, skipped)
        done = np.flatnonzero(ends == d)
        result[done] = now[lengths_a[done], done]
        before, last = last, now
    return result


def cheapest_path(cost: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest way from the first to the last cell of each table, going down, right, or both at once.

    Of moves into a cell that cost the same, the diagonal one is taken, else the one down.

    Args:
        cost: of each cell, `[A, B, P]`.
        rows: of each table, `[P]`, at least 1 and at most A; cells beyond are not looked at.
        columns: of each table, `[P]`, at least 1 and at most B.

    Returns:
        The cells on the way, backwards: rows and columns, `[A + B - 1, P]`, and how many of them count, `[P]`.
    """
    longest_a, longest_b, pairs = cost.shape
    came_from = _directions(cost)
    i, j, every = rows - 1, columns - 1, np.arange(pairs)
    path_i, path_j = np.zeros((2, longest_a + longest_b - 1, pairs), np.intp)
    counts = np.ones(pairs, np.intp)
    for step in range(len(path_i)):
        path_i[step], path_j[step] = i, j
        if not (i.any() or j.any()):
            break
        counts += (i > 0) | (j > 0)
        move = came_from[i + j, i, every]
        i, j = np.maximum(i - (move != _RIGHT), 0), np.maximum(j - (move != _DOWN), 0)
    return path_i, path_j, counts


_DIAGONAL, _DOWN, _RIGHT = 0, 1, 2


def _directions(cost: np.ndarray) -> np.ndarray:
    """By which move the cheapest way enters a cell: `[A + B - 1, A, P]`, by diagonal and row."""
    longest_a, longest_b, pairs = cost.shape
    came_from = np.zeros((longest_a + longest_b - 1, longest_a, pairs), np.int8)
    # Row 0 of the totals is a border that nothing comes from; row i+1 belongs to row i of the tables.
    before = np.full((longest_a + 1, pairs), np.inf)
    last = before.copy()
    last[1] = cost[0, 0]
    for d in range(1, len(came_from)):
        low, high = max(0, d - longest_b + 1), min(longest_a - 1, d)
        i = np.arange(low, high + 1)
        ways = np.stack((before[low : high + 1], last[low : high + 1], last[low + 1 : high + 2]))  # [3, n, P]
        move = ways.argmin(0)
        came_from[d, low : high + 1] = move
        now = np.full_like(last, np.inf)
        now[low + 1 : high + 2] = np.take_along_axis(ways, move[None], 0)[0] + cost[i, d - i]
        before, last = last, now
    return came_from
