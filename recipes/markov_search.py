"""Searchers of one step's memory, which anything that claims to have learned to search must beat.

All are Markov chains over the objects of a grid, given the target: where the next fixation is depends on the object
that is fixated now, and on nothing else. So each is a table, of which likelihoods and samples are read off.

| fitted by | next fixation | end |
| --- | --- | --- |
| `fit_uniform` | any object | as often as in the data |
| `fit_centre` | as often as each cell is fixated in the data | the same |
| `fit_markov` | by the displacement from the present one | as often as on the target, and off it |
| `fit_markov_target` | the target by its distance, else by displacement | the same |

Scanpaths are objects `[P, T]`, padded with `PAD`; the objects of a grid count row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipes.search_scenes import grid_distances
from vision.scanpath.scenes import PAD

__all__ = ["MarkovSearcher", "fit_centre", "fit_markov", "fit_markov_target", "fit_uniform"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_FEW = 0.1  # added to each count: nothing that was not seen is impossible
_ROUNDS = 30  # of the fit of displacements


@dataclass(frozen=True, eq=False)
class MarkovSearcher:
    """A Markov chain over the objects of a grid.

    Attributes:
        tables: natural logarithms of probabilities, `[K, N + 1, N + 1]`: K is N where they depend on the target,
            else 1; row n is after object n, the last one at the start; column n is object n, the last one the end.
    """

    tables: Floats

    def log_probs(self, targets: Integers, paths: Integers) -> Floats:
        """Of what comes after each of the fixations that came, `[P, T + 1, N + 1]`; as of `Searcher.log_probs`.

        Args:
            targets: `[P]`.
            paths: `[P, T]`.
        """
        start = self.tables.shape[1] - 1
        at = np.pad(np.where(paths == PAD, start, paths), ((0, 0), (1, 0)), constant_values=start)
        return self.tables[self._table(targets)[:, None], at]

    def search(self, rng: np.random.Generator, targets: Integers, max_length: int) -> Integers:
        """A scanpath for each target, `[P, T]`, of at most `max_length` fixations."""
        end, table = self.tables.shape[1] - 1, self._table(targets)
        at, ended, path = np.full(len(targets), end), np.zeros(len(targets), bool), []
        for _ in range(max_length):
            chances = np.exp(self.tables[table, at]).cumsum(-1)
            drawn = (chances < rng.random((len(at), 1)) * chances[:, -1:]).sum(-1)
            ended |= drawn == end
            path.append(np.where(ended, PAD, drawn))
            at = np.where(ended, end, drawn)
        return np.stack(path, 1)

    def _table(self, targets: Integers) -> Integers:
        return targets if len(self.tables) > 1 else np.zeros_like(targets)


class _Steps(NamedTuple):
    """Fixations that followed another one: from where, to where, what was searched for; `[M]` each."""

    at: Integers
    to: Integers
    target: Integers


def _steps(targets: Integers, paths: Integers) -> _Steps:
    follows = paths[:, 1:] != PAD
    wanted = np.broadcast_to(targets[:, None], follows.shape)
    return _Steps(paths[:, :-1][follows], paths[:, 1:][follows], wanted[follows])


def fit_uniform(rows: int, columns: int, targets: Integers, paths: Integers) -> MarkovSearcher:
    """Any object alike.

    Args:
        rows: of the grid.
        columns: of the grid.
        targets: of the scanpaths, `[P]`.
        paths: `[P, T]`.
    """
    count = rows * columns
    return _chain(np.full(count, 1 / count), np.full((1, count, count), 1 / count), _stop_rates(targets, paths, False))


def fit_centre(rows: int, columns: int, targets: Integers, paths: Integers) -> MarkovSearcher:
    """Each cell as often as in the data, which is mostly the centre; arguments as of `fit_uniform`."""
    shares = _shares(paths[paths != PAD], rows * columns)
    moves = np.broadcast_to(shares, (1, len(shares), len(shares)))
    return _chain(shares, moves, _stop_rates(targets, paths, False))


def fit_markov(rows: int, columns: int, targets: Integers, paths: Integers) -> MarkovSearcher:
    """By displacement in rows and columns, of the greatest likelihood; arguments as of `fit_uniform`."""
    steps, count = _steps(targets, paths), rows * columns
    weights = _displacements(rows, columns, steps, np.ones((len(steps.at), count), bool))
    moves = (weights / weights.sum(-1, keepdims=True))[None]
    return _chain(_shares(paths[:, 0], count), moves, _stop_rates(targets, paths, True))


def fit_markov_target(rows: int, columns: int, targets: Integers, paths: Integers) -> MarkovSearcher:
    """To the target as often as from its distance in the data, else by displacement; arguments as of `fit_uniform`."""
    steps, count = _steps(targets, paths), rows * columns
    every, distances = np.arange(count), np.rint(grid_distances(rows, columns)).astype(int)
    away = steps.at != steps.target
    by_distance = distances[steps.at, steps.target][away]
    jumped = (steps.to == steps.target)[away]
    tried = np.bincount(by_distance, minlength=distances.max() + 1)
    hits = np.bincount(by_distance[jumped], minlength=len(tried))
    jump = (hits + _FEW) / (tried + 2 * _FEW)  # [distance]
    # What is left is explained by displacement: steps to the target from elsewhere, and the target as an alternative to
    # other steps, do not count.
    allowed = (every != steps.target[:, None]) | ~away[:, None]
    by_displacement = ~away.copy()
    by_displacement[away] = ~jumped
    chosen = _Steps(*(part[by_displacement] for part in steps))
    weights = _displacements(rows, columns, chosen, allowed[by_displacement])
    moves = np.repeat(weights[None], count, 0)  # [target, at, to]
    moves[every, :, every] = 0
    moves[every, every] = weights
    moves /= moves.sum(-1, keepdims=True)
    chance = jump[distances]  # [target, at]
    chance[every, every] = 0
    moves *= 1 - chance[..., None]
    moves[every, :, every] += chance
    return _chain(_shares(paths[:, 0], count), moves, _stop_rates(targets, paths, True))


def _displacements(rows: int, columns: int, steps: _Steps, allowed: NDArray[np.bool_]) -> Floats:
    """The weight of each displacement under which the steps are likeliest, as weights from object to object, `[N, N]`.

    A step goes to o from a with the weight of their displacement over the sum of those of all objects that are allowed.
    The fixed point of "times seen over times expected" is the maximum of the likelihood (Zermelo, 1929).
    """
    row, column = np.divmod(np.arange(rows * columns), columns)
    shift = (row[None] - row[:, None] + rows - 1) * (2 * columns - 1) + column[None] - column[:, None] + columns - 1
    kinds = (2 * rows - 1) * (2 * columns - 1)
    seen = np.bincount(shift[steps.at, steps.to], minlength=kinds) + _FEW
    weights = np.ones(kinds)
    options = shift[steps.at]  # [M, N]
    for _ in range(_ROUNDS):
        scale = 1 / np.where(allowed, weights[options], 0).sum(-1, keepdims=True)
        expected = np.bincount(options.ravel(), np.where(allowed, scale, 0).ravel(), minlength=kinds)
        weights = seen / (expected + _FEW * scale.mean())
    return weights[shift]


def _shares(objects: Integers, count: int) -> Floats:
    counts = np.bincount(objects, minlength=count) + _FEW
    return counts / counts.sum()


def _stop_rates(targets: Integers, paths: Integers, by_target: bool) -> tuple[float, float]:
    """How often a search ends after a fixation on the target, and on another object; if not `by_target` both alike."""
    lengths = (paths != PAD).sum(1)
    last = np.take_along_axis(paths, lengths[:, None] - 1, 1)[:, 0]
    on_target = paths == targets[:, None]
    if not by_target:
        both = _rate(len(paths), int(lengths.sum()))
        return both, both
    found = int((last == targets).sum())
    fixated = int(on_target.sum())
    return _rate(found, fixated), _rate(len(paths) - found, int(lengths.sum()) - fixated)


def _rate(hits: int, trials: int) -> float:
    return (hits + _FEW) / (trials + 2 * _FEW)


def _chain(first: Floats, moves: Floats, stop: tuple[float, float]) -> MarkovSearcher:
    """Puts first fixations `[N]`, steps `[K, N, N]`, and the rates of the end on and off the target together."""
    count, every = len(first), np.arange(len(first))
    kept = np.repeat(moves, count, 0) if len(moves) < count and stop[0] != stop[1] else moves
    ends = np.full(kept.shape[:2], stop[1])
    if len(kept) == count:
        ends[every, every] = stop[0]
    tables = np.zeros((len(kept), count + 1, count + 1))
    tables[:, :count, :count] = kept * (1 - ends[..., None])
    tables[:, :count, count] = ends
    tables[:, count, :count] = first
    with np.errstate(divide="ignore"):
        return MarkovSearcher(np.log(tables))
