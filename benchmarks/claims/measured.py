"""Values of several methods and training runs on the same inputs: their file, their table, and the claims on them."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.claims.paired import Comparison, Verdict, compare_runs, holm, judged
from benchmarks.claims.report import Claim, Table

__all__ = ["Measured", "Pair", "claims", "load", "runs", "save", "shares_table", "spread", "within"]

Measured = dict[tuple[str, int], NDArray[np.float64]]
"""By name and training run (0 where nothing is trained) a value for each input: of yes and no 1 and 0."""


@dataclass(frozen=True)
class Pair:
    """A claim: the values of one name are larger (sign 1) or smaller (-1) than those of another.

    Attributes:
        claim: In a sentence without a full stop.
        published: The paper's figures, and where they stand; "no figure" where it has none.
        ours: The name of what is claimed to be better.
        theirs: The name of what it is held against.
        sign: See above.
        percent: Values are shares.
    """

    claim: str
    published: str
    ours: str
    theirs: str
    sign: int = 1
    percent: bool = True


def runs(measured: Measured, name: str, like: str | None = None) -> list[list[float]]:
    """The runs of a name; what was not trained is repeated for each run of another."""
    own = [values.tolist() for (known, _), values in measured.items() if known == name]
    count = sum(known == like for known, _ in measured)
    return own * count if like is not None and len(own) == 1 else own


def claims(measured: Measured, pairs: Sequence[Pair], seeds: tuple[int, int]) -> list[Claim]:
    """Holds each claim against what was measured, p adjusted for their number.

    Args:
        measured: The values.
        pairs: What is claimed.
        seeds: The first and the last.
    """
    cases = [(runs(measured, own.ours, own.theirs), runs(measured, own.theirs, own.ours)) for own in pairs]
    compared = [compare_runs(ours, theirs) for ours, theirs in cases]
    rows = []
    for own, (ours, theirs), found, p in zip(pairs, cases, compared, holm([c.p for c in compared]), strict=True):
        low, high = sorted(own.sign * bound for bound in found.interval)
        words = _in_words(own, float(np.mean(theirs)), float(np.mean(ours)), found, f"p = {p:.2g}")
        difference = own.sign * found.difference
        verdict = judged(found, p, own.sign)
        rows.append(Claim(own.claim, own.published, words, verdict, found.n, seeds, difference, (low, high), p))
    return rows


def within(measured: Measured, own: Pair, margin: float, seeds: tuple[int, int]) -> Claim:
    """Holds the claim that ours loses less than a margin against what was measured.

    It is shown if the difference's 95 % interval lies above the margin's loss, contradicted if it lies below. p is that
    of a loss as large as the margin, of a normal distribution as wide as the interval.

    Args:
        measured: The values.
        own: What is compared; its claim says what the margin is.
        margin: The loss that is not to be reached, in the values' own unit.
        seeds: The first and the last.
    """
    ours, theirs = runs(measured, own.ours, own.theirs), runs(measured, own.theirs, own.ours)
    found = compare_runs(ours, theirs)
    low, high = sorted(own.sign * bound for bound in found.interval)
    says: Verdict = "shown" if low > -margin else "contradicted" if high < -margin else "not shown at this scale"
    error = max((high - low) / (2 * stats.norm.ppf(0.975)), 1e-9)
    difference = own.sign * found.difference
    p = float(2 * stats.norm.sf(abs(difference + margin) / error))
    tail = f"a loss of {margin:{'.1%' if own.percent else 'g'}} has p = {p:.2g}"
    words = _in_words(own, float(np.mean(theirs)), float(np.mean(ours)), found, tail, more_digits=1)
    return Claim(own.claim, own.published, words, says, found.n, seeds, difference, (low, high), p)


def _in_words(own: Pair, before: float, now: float, found: Comparison, tail: str, more_digits: int = 0) -> str:
    form = "%" if own.percent else "f"
    digits = 1 if own.percent else 3
    fine = digits + more_digits  # where a difference is held against a small margin
    low, high = found.interval
    good = found.better if own.sign > 0 else found.worse
    return (
        f"{before:.{digits}{form}} → {now:.{digits}{form}}: {found.difference:+.{fine}{form}} "
        f"({low:+.{fine}{form}} to {high:+.{fine}{form}}), better in {good} and worse in "
        f"{found.better + found.worse - good} of {found.n}, {tail}"
    )


def spread(values: Sequence[float], percent: bool = False) -> str:
    """The mean of runs with its 95 % interval (t)."""
    mean = statistics.fmean(values)
    form = ".1%" if percent else ".3f"
    if len(values) < 2:
        return f"{mean:{form}}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{form}} ± {half:{form}}"


def shares_table(title: str, measured: Measured, names: Sequence[str] | None = None) -> Table:
    """Of each name the mean share over its runs, with the interval of the mean, and each run."""
    chosen = list(dict.fromkeys(name for name, _ in measured)) if names is None else names
    rows = []
    for name in chosen:
        each = [statistics.fmean(run) for run in runs(measured, name)]
        rows.append([name, spread(each, percent=True), ", ".join(f"{share:.1%}" for share in each)])
    return Table(title, ["", "mean and 95 % interval", "runs"], rows)


def save(measured: Measured, path: Path) -> None:
    """A row for each input, a column for each name and run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"{name} #{run}" for name, run in measured])
        writer.writerows([f"{value:.6g}" for value in row] for row in np.stack(list(measured.values()), 1))


def load(path: Path) -> Measured:
    """Reads what `save` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    columns = np.array(rows, float).T
    names = [name.rpartition(" #") for name in header]
    return {(name, int(run)): values for (name, _, run), values in zip(names, columns, strict=True)}
