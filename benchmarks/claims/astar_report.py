"""What follows from the pictures that `benchmarks.claims.astar` drew: its claims, tables, and the file of outcomes."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.claims.paired import Comparison, compare, holm, rate_interval, verdict
from benchmarks.claims.report import Claim, Table

__all__ = [
    "Outcome",
    "Picture",
    "Results",
    "claims",
    "load_outcomes",
    "methods_table",
    "save_outcomes",
    "show_both",
]


@dataclass(frozen=True)
class Picture:
    """What is asked for: two objects, in the order in which the prompt names them, and a seed."""

    pairs: str
    names: tuple[str, str]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        found: How many of the two objects the detector finds.
        overlap: The segregation loss, 0 to 0.5, averaged over the steps.
        retention: The retention loss of one subject, 0.5 to 1, averaged over subjects and steps.
    """

    found: int
    overlap: float
    retention: float


Results = Mapping[str, Mapping[Picture, Outcome]]
"""Of each method, all with the same pictures."""


def show_both(outcomes: Iterable[Outcome]) -> int:
    """How many pictures show both objects."""
    return sum(o.found == 2 for o in outcomes)


@dataclass(frozen=True)
class _Asked:
    """A claim to hold the outcomes against: A-STAR over another method in one quantity, or (sign -1) under it."""

    claim: str
    published: str
    quantity: str
    over: str
    sign: int = 1
    least: float = 0.0


_ASKED = (
    _Asked(
        "A-STAR shows both subjects more often than the plain model",
        "no rate; text-text similarity 0.76 / 0.78 / 0.77 → 0.82 / 0.84 / 0.82 (table 1)",
        "both",
        "plain",
    ),
    _Asked(
        "A-STAR shows both subjects more often than Attend-and-Excite",
        "no rate; text-text similarity 0.80 / 0.82 / 0.81 → 0.82 / 0.84 / 0.82 (table 1)",
        "both",
        "Attend-and-Excite",
    ),
    _Asked(
        "Both losses show both subjects more often than segregation alone",
        "no rate; text-text similarity 0.79 / 0.82 / 0.80 → 0.82 / 0.84 / 0.82 (table 2)",
        "both",
        "segregation",
    ),
    _Asked(
        "Both losses show both subjects more often than retention alone",
        "no rate; text-text similarity 0.78 / 0.83 / 0.79 → 0.82 / 0.84 / 0.82 (table 2)",
        "both",
        "retention",
    ),
    _Asked("A-STAR makes the subjects' maps overlap less", "no figure; pictures", "overlap", "plain", -1, 0.01),
    _Asked("A-STAR keeps maps where they were a step before", "no figure; pictures", "retention", "plain", -1, 0.01),
)


def kinds(results: Results) -> list[str]:
    """The kinds of pairs that were drawn."""
    return list(dict.fromkeys(picture.pairs for picture in next(iter(results.values()))))


def _value(outcome: Outcome, quantity: str) -> float:
    return float(outcome.found == 2) if quantity == "both" else float(getattr(outcome, quantity))


def _of(results: Results, method: str, pairs: str, quantity: str) -> list[float]:
    return [_value(outcome, quantity) for picture, outcome in results[method].items() if picture.pairs == pairs]


def _in_words(asked: _Asked, before: float, now: float, found: Comparison, p: float) -> str:
    low, high = found.interval
    if asked.quantity == "both":
        return (
            f"{before:.1%} → {now:.1%}: {found.difference:+.1%} ({low:+.1%} to {high:+.1%}), {found.better} gained and "
            f"{found.worse} lost of {found.n}, p = {p:.2g}"
        )
    return (
        f"{before:.3f} → {now:.3f}: {found.difference:+.3f} ({low:+.3f} to {high:+.3f}), lower in {found.worse} of "
        f"{found.n}, p = {p:.2g}"
    )


def claims(results: Results) -> list[Claim]:
    """All claims, on seen and on held-out pairs."""
    cases = [(asked, pairs) for asked in _ASKED for pairs in kinds(results)]
    compared = []
    for asked, pairs in cases:
        ours, theirs = (_of(results, method, pairs, asked.quantity) for method in ("A-STAR", asked.over))
        compared.append((statistics.fmean(theirs), statistics.fmean(ours), compare(ours, theirs)))
    rows = []
    for (asked, pairs), (before, now, found), p in zip(
        cases, compared, holm([found.p for *_, found in compared]), strict=True
    ):
        seeds = [picture.seed for picture in results["A-STAR"] if picture.pairs == pairs]
        low, high = sorted(asked.sign * bound for bound in found.interval)
        difference = asked.sign * found.difference
        rows.append(
            Claim(
                f"{asked.claim} (pairs {pairs})",
                asked.published,
                _in_words(asked, before, now, found, p),
                verdict(difference, p, least=asked.least),
                found.n,
                (min(seeds), max(seeds)),
                difference,
                (low, high),
                p,
            )
        )
    return rows


def methods_table(results: Results, pairs: str, wall: Mapping[str, Mapping[str, float]]) -> Table:
    """Rates, maps and times of all methods on one kind of pairs."""
    header = [
        "method",
        "both subjects",
        "95 % interval",
        "one",
        "overlap",
        "retention",
        "s a picture",
        "time / plain",
    ]
    rows = []
    for method, outcomes in results.items():
        own = [outcome for picture, outcome in outcomes.items() if picture.pairs == pairs]
        low, high = rate_interval(show_both(own), len(own))
        rows.append(
            [
                method,
                f"{show_both(own) / len(own):.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{sum(o.found == 1 for o in own) / len(own):.1%}",
                f"{statistics.fmean(o.overlap for o in own):.3f}",
                f"{statistics.fmean(o.retention for o in own):.3f}",
                f"{wall[method]['seconds']:.2f}",
                f"{wall[method]['ratio']:.2f}",
            ]
        )
    pictures = len(_of(results, "plain", pairs, "both"))
    return Table(f"A-STAR, pairs {pairs}: {pictures} pictures by each method", header, rows)


_COLUMNS = ("found", "overlap", "retention")


def save_outcomes(results: Results, path: Path) -> None:
    """A row for each picture, with the columns of each method."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pairs", "first", "second", "seed", *(f"{m}: {c}" for m in results for c in _COLUMNS)])
        for picture in next(iter(results.values())):
            own = [results[method][picture] for method in results]
            values = [v for o in own for v in (o.found, f"{o.overlap:.5f}", f"{o.retention:.5f}")]
            writer.writerow([picture.pairs, *picture.names, picture.seed, *values])


def load_outcomes(path: Path) -> Results:
    """Reads what `save_outcomes` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        results: dict[str, dict[Picture, Outcome]]
        results = {name.partition(": ")[0]: {} for name in reader.fieldnames or () if ": " in name}
        for row in reader:
            picture = Picture(row["pairs"], (row["first"], row["second"]), int(row["seed"]))
            for method, own in results.items():
                found, overlap, retention = (row[f"{method}: {column}"] for column in _COLUMNS)
                own[picture] = Outcome(int(found), float(overlap), float(retention))
    return results
