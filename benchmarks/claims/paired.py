"""Two methods on the same inputs: how much they differ, how sure that is, and what it says about a claim.

Needs scipy (`pip install "attnsuite[test]"`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import stats

__all__ = [
    "VERDICTS",
    "Comparison",
    "Verdict",
    "compare",
    "compare_runs",
    "holm",
    "judged",
    "rate_interval",
    "sign_test",
    "verdict",
]

Verdict = Literal["shown", "not shown at this scale", "contradicted"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs, input by input.

    Attributes:
        n: Inputs.
        difference: Mean of ours minus theirs.
        interval: 95 % bootstrap interval of the difference.
        better: Inputs in which ours is larger.
        worse: Inputs in which it is smaller.
        p: Of the exact two-sided sign test.
    """

    n: int
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p: float


def compare(ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 9999, seed: int = 0) -> Comparison:
    """Compares two methods that were given the same inputs.

    Args:
        ours: One value for each input.
        theirs: Of the same inputs, in the same order.
        resamples: Of the bootstrap, which draws inputs.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the two are not of the same inputs, or there are fewer than two.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"{len(ours)} values of ours and {len(theirs)} of theirs: give both for the same inputs, >= 2")
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    bounds = float(interval.low), float(interval.high)
    return Comparison(len(differences), float(differences.mean()), bounds, better, worse, sign_test(better, worse))


def compare_runs(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, resamples: int = 9999, seed: int = 0
) -> Comparison:
    """Compares two methods over several training runs, all given the same inputs.

    An input is better where the mean over the runs is larger, so that the sign test counts each input once. The
    bootstrap draws runs and inputs, each with replacement: its interval says how far the difference depends on both.

    Args:
        ours: Of each run one value for each input.
        theirs: Of the same runs and inputs, in the same order.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the two are not of the same runs and inputs, or there are fewer than two of either.
    """
    shapes = {len(run) for run in (*ours, *theirs)}
    if len(ours) != len(theirs) or len(ours) < 2 or len(shapes) != 1 or min(shapes) < 2:
        raise ValueError(
            f"{len(ours)} runs of ours and {len(theirs)} of theirs, of {sorted(shapes)} inputs: give both for the same "
            "runs and inputs, two or more of each"
        )
    differences = np.asarray(ours, float) - np.asarray(theirs, float)  # [R, N]
    runs, inputs = differences.shape
    means = [
        np.einsum("sr,rn,sn->s", of_runs / runs, differences, of_inputs.astype(float) / inputs, optimize=True)
        for of_runs, of_inputs in _drawn(runs, inputs, resamples, seed)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    each = differences.mean(0)
    better, worse = int((each > 0).sum()), int((each < 0).sum())
    bounds = float(low), float(high)
    return Comparison(inputs, float(differences.mean()), bounds, better, worse, sign_test(better, worse))


@functools.lru_cache(maxsize=4)
def _drawn(runs: int, inputs: int, resamples: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """How often a bootstrap draws each run and each input, `[S, R]` and `[S, N]`, in portions.

    Drawing takes longer than all else, and is the same for comparisons of one size.
    """
    rng, portions = np.random.default_rng(seed), []
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        of_runs = rng.multinomial(runs, [1 / runs] * runs, size)
        portions.append((of_runs, rng.multinomial(inputs, [1 / inputs] * inputs, size).astype(np.uint16)))
    return portions


def sign_test(better: int, worse: int) -> float:
    """The exact two-sided p-value of as many gains and losses; of yes and no this is McNemar's exact test."""
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def rate_interval(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval (Wilson) of a share."""
    interval = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for being several (Holm): each may be held against the level that one alone would be."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(difference: float, p: float, *, least: float = 0.0, level: float = 0.05) -> Verdict:
    """What a comparison says about the claim that the difference is above 0.

    Args:
        difference: As measured, in the direction of the claim.
        p: Adjusted for the number of claims.
        least: Smaller differences say nothing, however sure they are.
        level: From which p upwards nothing is said.
    """
    if p >= level or abs(difference) <= least:
        return "not shown at this scale"
    return "shown" if difference > 0 else "contradicted"


def judged(found: Comparison, p: float, sign: int) -> Verdict:
    """`verdict`, which says something only where the interval over runs and questions leaves out 0 too."""
    low, high = found.interval
    return verdict(sign * found.difference, p) if low > 0 or high < 0 else "not shown at this scale"
