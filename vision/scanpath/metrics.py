"""How alike two scanpaths are, how alike two groups of searchers behave, and how well the next fixation is foretold.

| function | compares | in | best |
| --- | --- | --- | --- |
| `sequence_score` | order of objects | objects | 1 |
| `fixation_edit_distance` | order of objects | objects | 0 |
| `scanmatch` | order of places, near ones alike | objects and their places, or pixels | 1 |
| `multimatch` | vector, direction, length, position, duration | pixels | 1 each |
| `behaviour`, `behavioural_delta` | habits of a group of searchers | objects | 0 |
| `next_object` | predicted probabilities with what came next | log-probabilities, objects | 0 nats |

Each can be won by a trick, which its docstring names; "look at the centre, then at the target, twice" reaches people's
own Sequence Score and edit distance, and reading line by line wins MultiMatch's vector and length. Report several, of
sampled scanpaths, beside such baselines and beside people compared with people.

**Input.** A scanpath of objects is a sequence of integers; one in pixels is `[T, 2]`, x and y. Comparisons take one
scanpath on each side and return a float, or a list of scanpaths on one or both sides and return an array, a value for
each pair (a single scanpath is compared with all of the list). An empty list is an empty scanpath.

**Bad input.** Objects that are negative or not integers, coordinates that are not finite or of another shape, and lists
of different lengths raise an error. What an empty scanpath or one of a single fixation gives is in each docstring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vision.scanpath.alignment import align, cheapest_path
from vision.scanpath.pairs import Pairs, as_array, checked_points, joined, listed, paired

__all__ = [
    "behaviour",
    "behavioural_delta",
    "fixation_edit_distance",
    "multimatch",
    "next_object",
    "scanmatch",
    "sequence_score",
]

ObjectIds = Sequence[int] | NDArray[np.integer]
Points = NDArray[np.floating]


@overload
def sequence_score(a: ObjectIds, b: ObjectIds) -> float: ...
@overload
def sequence_score(a: ObjectIds | Sequence[ObjectIds], b: ObjectIds | Sequence[ObjectIds]) -> NDArray[np.float64]: ...
def sequence_score(a: Any, b: Any) -> Any:
    """Length of the longest common subsequence of objects, as a share of the longer scanpath.

    Needleman and Wunsch's alignment with 1 for a match and 0 for all else (Borji et al., "Analysis of Scores, Datasets,
    and Models in Visual Saliency Prediction", ICCV 2013), here over objects instead of clusters of fixations.

    Fooled by: knowing the target and stopping soon. Most searches end on the target and their lengths vary widely, so
    that a short scanpath that ends there scores as people do among each other. Near misses count nothing.

    Args:
        a: objects of one scanpath, or a list of such.
        b: as `a`.

    Returns:
        From 0 to 1, more is better. Two empty scanpaths 1, an empty one and another 0.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    pairs = paired(a, b, dim=1)
    matches = pairs.mapped(lambda p: align(p.a, p.b, p.lengths_a, p.lengths_b, np.equal, 0.0))
    return pairs.result(_share(matches, pairs.longer, empty=1.0))


@overload
def fixation_edit_distance(a: ObjectIds, b: ObjectIds, normalise: bool = False) -> float: ...
@overload
def fixation_edit_distance(
    a: ObjectIds | Sequence[ObjectIds], b: ObjectIds | Sequence[ObjectIds], normalise: bool = False
) -> NDArray[np.float64]: ...
def fixation_edit_distance(a: Any, b: Any, normalise: bool = False) -> Any:
    """Insertions, deletions and substitutions of objects that turn one scanpath into the other (Levenshtein, 1966).

    Fooled by: being short. The distance is never less than the difference in length and never more than the longer
    length, so a long guess always costs more than a short one; "target, target" beats people compared with people.
    Normalised, nearly everything lies close to 1. Near misses count as much as far ones.

    Args:
        a: objects of one scanpath, or a list of such.
        b: as `a`.
        normalise: divide by the longer length.

    Returns:
        Edits, or from 0 to 1; less is better. Two empty scanpaths 0; an empty one and another the other's length, or 1.

    Raises:
        TypeError, ValueError: see the module's docstring.
    """
    pairs = paired(a, b, dim=1)
    edits = pairs.mapped(lambda p: -align(p.a, p.b, p.lengths_a, p.lengths_b, lambda x, y: -1.0 * (x != y), -1.0))
    edits = np.abs(edits)  # no negative zeros
    return pairs.result(_share(edits, pairs.longer, empty=0.0) if normalise else edits)


@overload
def scanmatch(
    a: ObjectIds | Points,
    b: ObjectIds | Points,
    positions: ArrayLike | None = None,
    *,
    unit: float | tuple[float, float] = 1.0,
    threshold: float = 3.5,
    gap: float = 0.0,
) -> float: ...
@overload
def scanmatch(
    a: ObjectIds | Points | Sequence[ObjectIds] | Sequence[Points],
    b: ObjectIds | Points | Sequence[ObjectIds] | Sequence[Points],
    positions: ArrayLike | None = None,
    *,
    unit: float | tuple[float, float] = 1.0,
    threshold: float = 3.5,
    gap: float = 0.0,
) -> NDArray[np.float64]: ...
def scanmatch(
    a: Any,
    b: Any,
    positions: ArrayLike | None = None,
    *,
    unit: float | tuple[float, float] = 1.0,
    threshold: float = 3.5,
    gap: float = 0.0,
) -> Any:
    """Best alignment of two scanpaths, where fixations near each other match in part.

    Two fixations a distance d apart are worth `threshold - d`, one left out is worth `gap`, and the sum is divided by
    `threshold` times the longer length (Cristino et al., "ScanMatch", Behavior Research Methods 42, 2010; without their
    bins of duration).

    Fooled by: staying where people look most, the centre and the target, for about as long as they do; the order inside
    that region hardly matters. Without a penalty for gaps, fixations far from everything are left out at no cost but
    the length. A model above what people reach among each other has seen the answers.

    Args:
        a: objects of one scanpath where `positions` is given, `[T, 2]` places where it is not; or a list of such.
        b: as `a`.
        positions: where each object is, `[N, 2]`: cells of a grid (`Objects.cells`), or centres in pixels with `unit`.
        unit: what counts as a distance of 1: a length, or one along each axis, in units of the positions. Of pixels of
            a grid, the width and height of its cells.
        threshold: distance from which on a match is worth nothing, in `unit`.
        gap: at most 0.

    Returns:
        At most 1, more is better; with `gap=0` at least 0. Two empty scanpaths 1, an empty one and another
        `gap / threshold`.

    Raises:
        TypeError, ValueError: see the module's docstring; also an object without position, a unit or threshold that is
            not positive, a gap above 0.
    """
    scale = np.broadcast_to(np.asarray(unit, float), 2)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"unit={unit}: what counts as a distance of 1 must be positive.")
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive; it is a distance, in units of {unit}.")
    if not gap <= 0:
        raise ValueError(f"gap={gap} must not be above 0: leaving fixations out would be rewarded.")
    pairs = paired(a, b, dim=1 if positions is not None else 2)
    if positions is None:
        pairs = pairs._replace(a=_plane(pairs.a, scale), b=_plane(pairs.b, scale))
    else:
        places = checked_points(positions, "positions")
        for objects in (pairs.a, pairs.b):
            if objects.max(initial=-1) >= len(places):
                raise ValueError(f"object {objects.max()} has no position: positions are given for {len(places)}.")
        plane = _plane(places, scale) if len(places) else np.zeros(1, complex)
        pairs = pairs._replace(a=plane[pairs.a], b=plane[pairs.b])
    worth = pairs.mapped(
        lambda p: align(p.a, p.b, p.lengths_a, p.lengths_b, lambda x, y: threshold - np.abs(x - y), gap)
    )
    return pairs.result(_share(worth, threshold * pairs.longer, empty=1.0))


@overload
def multimatch(a: Points, b: Points, size: tuple[float, float]) -> dict[str, float]: ...
@overload
def multimatch(
    a: Points | Sequence[Points], b: Points | Sequence[Points], size: tuple[float, float]
) -> dict[str, NDArray[np.float64]]: ...
def multimatch(a: Any, b: Any, size: tuple[float, float]) -> Any:
    """Likeness of two scanpaths in five dimensions, which are not to be averaged.

    Saccades, the steps between fixations, are aligned along the cheapest path through the differences of their vectors;
    each dimension is 1 minus the median difference on that path, over the most it can be (Jarodzka et al., ETRA 2010;
    Dewhurst et al., Behavior Research Methods 44, 2012). Scanpaths are not simplified beforehand.

    | dimension | difference | over |
    | --- | --- | --- |
    | vector | of saccades | twice the diagonal |
    | direction | of their angles | pi |
    | length | of their lengths | the diagonal |
    | position | of the fixations that they start from | the diagonal |
    | duration | of those fixations' durations | the longer one |

    Fooled by: small steps. Vector and length are high for any scanpath of short saccades, and reading line by line
    beats people. The path skips what does not fit, and a median does not see the worse half; where a scanpath ends is
    not looked at at all. Staying on a spot has direction 0. Random scanpaths get .6 to .9: report a baseline's figure.

    Args:
        a: fixations of one scanpath in pixels, `[T, 2]`, or `[T, 3]` with their durations in any unit; or a list of
            such. Of a model that predicts objects, their centres.
        b: as `a`.
        size: width and height of the picture.

    Returns:
        vector, direction, length, position and duration, at most 1, more is better. Not a number where one of the two
        has fewer than three fixations; of durations also where one has none.

    Raises:
        TypeError, ValueError: see the module's docstring; also a size or a duration that is not positive.
    """
    if len(size) != 2 or not all(np.isfinite(side) and side > 0 for side in size):
        raise ValueError(f"size={size}: expected the width and height of the picture, in pixels.")
    pairs = paired(a, b, dim=2)
    enough = np.minimum(pairs.lengths_a, pairs.lengths_b) >= 3
    values = np.full((5, len(enough)), np.nan)
    if enough.any():
        values[:, enough] = pairs.at(enough).mapped(lambda p: _multimatch(p, float(np.hypot(*size))))
    names = ("vector", "direction", "length", "position", "duration")
    return {name: pairs.result(value) for name, value in zip(names, values, strict=True)}


def _multimatch(pairs: Pairs, diagonal: float) -> np.ndarray:
    """The five dimensions, `[5, P]`, of scanpaths of three fixations or more."""
    starts_a, starts_b = _plane(pairs.a)[:-1], _plane(pairs.b)[:-1]
    saccades_a, saccades_b = np.diff(_plane(pairs.a), axis=0), np.diff(_plane(pairs.b), axis=0)
    cost = np.abs(saccades_a[:, None] - saccades_b[None])  # [A - 1, B - 1, P]
    i, j, counts = cheapest_path(cost, pairs.lengths_a - 1, pairs.lengths_b - 1)
    every = np.arange(len(counts))
    step_a, step_b = saccades_a[i, every], saccades_b[j, every]
    turn = np.abs(np.angle(step_a) - np.angle(step_b))
    last_a, last_b = pairs.a[..., 2][i, every], pairs.b[..., 2][j, every]
    differences = np.stack(
        (
            np.abs(step_a - step_b) / (2 * diagonal),
            np.minimum(turn, 2 * np.pi - turn) / np.pi,
            np.abs(np.abs(step_a) - np.abs(step_b)) / diagonal,
            np.abs(starts_a[i, every] - starts_b[j, every]) / diagonal,
            np.abs(last_a - last_b) / np.maximum(last_a, last_b),
        )
    )
    return 1 - _median(differences, counts)


def behaviour(
    scanpaths: ObjectIds | Sequence[ObjectIds], targets: int | Sequence[int] | None = None
) -> dict[str, float]:
    """Habits of a group of searchers.

    A run is a stretch of fixations on one object. Each fixation is a search (the first of a run on an object not seen
    before), a revisit (the first of a run on one seen before) or a refixation (any other of a run). OAT's measure.

    Fooled by: anything that gets five averages right. Nothing here depends on the picture or on where objects are; the
    training set's own average behaviour, replayed anywhere, is perfect.

    Args:
        scanpaths: objects of one scanpath, or a list of such.
        targets: the object searched for, one for all or one for each scanpath; None where there is none to be found.

    Returns:
        found: share of scanpaths whose last fixation is on the target; left out without targets.
        steps: mean number of fixations.
        search, refixation, revisit: mean shares of fixations, which sum to 1. Empty scanpaths do not count in these,
            but in the others; not a number where all are empty.

    Raises:
        TypeError, ValueError: see the module's docstring; also as many targets as not scanpaths.
    """
    paths, _ = listed(scanpaths, dim=1)
    ids, lengths = joined(paths, dim=1)
    filled = lengths > 0
    result: dict[str, float] = {}
    if targets is not None:
        wanted = np.asarray(as_array(targets))
        if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (len(paths),)):
            raise ValueError(f"targets={targets!r}: expected one object for all or one for each of {len(paths)}.")
        last = ids[np.cumsum(lengths)[filled] - 1]
        result["found"] = float((last == np.broadcast_to(wanted, len(paths))[filled]).sum() / len(paths))
    result["steps"] = float(lengths.mean())
    which = np.repeat(np.arange(len(paths)), lengths)
    visits = which * (ids.max(initial=0) + 1) + ids  # the same number for the same object of the same scanpath
    starts = np.diff(visits, prepend=-1) != 0
    first = np.zeros(len(ids), bool)
    first[np.unique(visits, return_index=True)[1]] = True
    for name, kind in (("search", first), ("refixation", ~starts), ("revisit", starts & ~first)):
        shares = np.bincount(which[kind], minlength=len(paths))[filled] / lengths[filled]
        result[name] = float(shares.mean()) if len(shares) else float("nan")
    return result


def behavioural_delta(model: Mapping[str, float], human: Mapping[str, float]) -> float:
    """Mean relative error of a model's habits, OAT's behavioural metric.

    Fooled by: what `behaviour` is fooled by. A habit that is rare in people, such as revisits, weighs as much as any
    other, so that a small absolute error in it can decide.

    Args:
        model: what `behaviour` says of the model's scanpaths.
        human: of people's, with the same keys.

    Returns:
        From 0, less is better. Infinite where people never show a habit that the model has.

    Raises:
        ValueError: other habits in one than in the other, or none.
    """
    if not human or set(model) != set(human):
        raise ValueError(f"habits {sorted(model)} and {sorted(human)} differ; give targets to both calls or to none.")
    errors = [abs(model[name] - value) for name, value in human.items()]
    relative = [
        error / value if value else (float("inf") if error else 0.0)
        for error, value in zip(errors, human.values(), strict=True)
    ]
    return float(np.mean(relative))


def next_object(log_probs: ArrayLike, objects: ArrayLike, ignore_index: int = -100) -> dict[str, float]:
    """How well the next fixation is foretold, given all before it as people made them.

    Fooled by: very little in nats, which no sampling or stopping trick improves; but end of search counts as a token,
    so compare within one vocabulary, and with a baseline. Top-1 rewards "stay where
    you are", which is a frequent step and a bad scanpath when taken always. Equal probabilities share a hit, so that a
    constant gains nothing by order.

    Args:
        log_probs: `[..., K]`, natural logarithms of probabilities over objects and what else can come next.
        objects: what came next, `[...]`, from 0 to K-1.
        ignore_index: marks padding in `objects`.

    Returns:
        nats: mean of the negative logarithm of the probability of what came; less is better, infinite where it was 0.
        top1: share of fixations that were the most likely ones.
        probability: mean probability of what came.
        Not a number where all is padding.

    Raises:
        TypeError: objects that are not integers.
        ValueError: shapes that do not fit, objects out of range, probabilities that do not sum to 1.
    """
    scores, came = np.asarray(as_array(log_probs), float), np.asarray(as_array(objects))
    if came.dtype.kind not in "iu":
        raise TypeError(f"objects: expected integers, got {came.dtype}.")
    if scores.shape[:-1] != came.shape or scores.ndim == 0:
        raise ValueError(f"log_probs {scores.shape} and objects {came.shape}: expected [..., K] and [...].")
    counted = came != ignore_index
    scores, came = scores[counted], came[counted]
    if not len(came):
        return dict.fromkeys(("nats", "top1", "probability"), float("nan"))
    if came.min() < 0 or came.max() >= scores.shape[-1]:
        raise ValueError(f"objects from {came.min()} to {came.max()}: expected 0 to {scores.shape[-1] - 1}.")
    totals = np.exp(scores).sum(-1)
    if not (np.abs(totals - 1) < 1e-2).all():
        raise ValueError(f"log_probs: probabilities sum to {totals.min():.3g} … {totals.max():.3g}; take log_softmax.")
    likely = scores[np.arange(len(came)), came]
    best = scores == scores.max(-1, keepdims=True)
    hits = best[np.arange(len(came)), came] / best.sum(-1)
    return {"nats": float(-likely.mean()), "top1": float(hits.mean()), "probability": float(np.exp(likely).mean())}


def _plane(points: np.ndarray, unit: Sequence[float] | np.ndarray = (1.0, 1.0)) -> np.ndarray:
    """Points `[..., 2 or 3]` as complex numbers `[...]`, whose differences have a length and an angle."""
    return points[..., 0] / unit[0] + 1j * points[..., 1] / unit[1]


def _share(values: np.ndarray, totals: np.ndarray, empty: float) -> np.ndarray:
    return np.divide(values, totals, out=np.full(len(values), empty), where=totals > 0)


def _median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Medians `[K, P]` over the first `counts`, `[P]`, of `values`, `[K, S, P]`; not a number if one of them is not."""
    beyond = np.arange(values.shape[1])[:, None] >= counts
    ordered = np.sort(np.where(beyond, np.inf, values), axis=1)
    every = np.arange(len(counts))
    middle = (ordered[:, (counts - 1) // 2, every] + ordered[:, counts // 2, every]) / 2
    return np.where((np.isnan(values) & ~beyond).any(1), np.nan, middle)
