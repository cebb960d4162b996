"""What follows from what `benchmarks.claims.oat` measured: its claims, tables, and the files of values."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.claims.measured import Measured, runs, spread
from benchmarks.claims.paired import Comparison, compare_runs, holm, judged
from benchmarks.claims.report import Claim, Table

__all__ = [
    "BAND",
    "claims",
    "gap_closed",
    "in_band",
    "people_table",
    "scenes_table",
    "transfer_table",
]

BAND: dict[str, tuple[float, float]] = {
    "nats": (0.0, 3.15),
    "ScanMatch": (0.23, 0.36),
    "delta": (0.0, 0.30),
    "steps": (9.0, 18.0),
}
"""What was asked of OAT on people's searches, all of it together."""
_GAP_ASKED = 0.6


def gap_closed(measured: Measured, name: str = "OAT") -> list[float]:
    """Of each run the share of the gap between 'Markov + target' and the searcher itself that a model closes."""
    below, above = (float(measured[bound, 0].mean()) for bound in ("searcher itself", "Markov + target"))
    return [(above - statistics.fmean(run)) / (above - below) for run in runs(measured, name)]


@dataclass(frozen=True)
class _Asked:
    """A claim: one is less (sign -1) or more than another, of what was measured in one part."""

    claim: str
    part: str
    ours: str
    theirs: str
    sign: int = -1
    published: str = "no figure at hand"


_CHAIN = "Markov steps with jumps to the target"

_ASKED = (
    _Asked(f"OAT foretells fixations better than {_CHAIN}", "scenes", "OAT", "Markov + target"),
    _Asked("OAT closes 60 % of the gap between those and the searcher itself", "scenes", "OAT", "60 % of the gap"),
    _Asked("Distance-preserving codes of position are better than sinusoidal ones", "scenes", "OAT", "sinusoidal code"),
    _Asked("Distance-preserving codes of position are better than learned ones", "scenes", "OAT", "learned code"),
    _Asked("The target token helps", "scenes", "OAT", "no target token"),
    _Asked("Appearance helps", "scenes", "OAT", "no appearance"),
    _Asked("Shuffled crops are worse than none", "scenes", "no appearance", "OAT, crops shuffled"),
    _Asked(f"OAT foretells people's fixations better than {_CHAIN}", "people", "nats: OAT", "nats: Markov + target"),
    _Asked(
        f"OAT's scanpaths are more like people's than those of {_CHAIN} (ScanMatch)",
        "people",
        "ScanMatch: OAT, sampled",
        "ScanMatch: Markov + target",
        sign=1,
    ),
)


def _with_the_bar(measured: Measured) -> Measured:
    """Also the value at which the asked share of the gap would be closed."""
    below, above = measured["searcher itself", 0], measured["Markov + target", 0]
    return measured | {("60 % of the gap", 0): above - _GAP_ASKED * (above - below)}


def _in_words(asked: _Asked, before: float, now: float, found: Comparison, p: float) -> str:
    low, high = found.interval
    unit = "" if asked.sign > 0 else " nats a token"
    good = found.better if asked.sign > 0 else found.worse
    inputs = "scenes" if asked.part == "scenes" else "pictures"
    return (
        f"{before:.3f} → {now:.3f}{unit}: {found.difference:+.3f} ({low:+.3f} to {high:+.3f}), "
        f"better in {good} of {found.n} {inputs}, p = {p:.2g}"
    )


def claims(measured: Mapping[str, Measured], seeds: tuple[int, int]) -> list[Claim]:
    """All claims on what was measured.

    Args:
        measured: 'scenes', and 'people' where they are at hand.
        seeds: The first and the last, of the scenes.
    """
    known = {name: _with_the_bar(values) if name == "scenes" else values for name, values in measured.items()}
    cases = [asked for asked in _ASKED if asked.part in known]
    compared = []
    for asked in cases:
        ours = runs(known[asked.part], asked.ours, asked.theirs)
        theirs = runs(known[asked.part], asked.theirs, asked.ours)
        compared.append((float(np.mean(theirs)), float(np.mean(ours)), compare_runs(ours, theirs)))
    rows = []
    for asked, (before, now, found), p in zip(cases, compared, holm([own[2].p for own in compared]), strict=True):
        low, high = sorted(asked.sign * bound for bound in found.interval)
        difference = asked.sign * found.difference
        words = _in_words(asked, before, now, found, p)
        if asked.theirs == "60 % of the gap":
            words = f"{spread(gap_closed(known['scenes']), percent=True)} of it closed; at 60 %: {words}"
        says = judged(found, p, asked.sign)
        rows.append(Claim(asked.claim, asked.published, words, says, found.n, seeds, difference, (low, high), p))
    return rows


def _score(name: str, values: list[float]) -> str:
    """A score as it is printed."""
    digits = _DIGITS.get(name, 3)
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ± {_half_width(values):.{digits}f}"


def _half_width(values: list[float]) -> float:
    """Half of the 95 % interval of a mean (t)."""
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def scenes_table(measured: Measured) -> Table:
    """Nats of all on the scenes, and how much of the gap each closes."""
    rows = []
    for name in dict.fromkeys(name for name, _ in measured):
        nats = [statistics.fmean(run) for run in runs(measured, name)]
        rows.append([name, spread(nats), spread(gap_closed(measured, name), percent=True), str(len(nats))])
    title = "OAT on scenes: nats a token (mean of the runs, 95 % interval of the mean)"
    return Table(title, ["predictor", "nats", "of the gap closed", "runs"], rows)


def transfer_table(measured: Measured) -> Table:
    """The same on a grid that was not trained on."""
    table = scenes_table(measured)
    return Table("OAT trained on 3 x 9, measured on 4 x 7", table.header, table.rows)


_SCORES = ("nats", "top-1", "SS", "FED", "ScanMatch", "MM direction", "MM position", "found", "steps", "delta")
_DIGITS = {"FED": 1, "steps": 1}


def in_band(scores: Mapping[str, float]) -> bool:
    """Whether all that was asked of OAT holds."""
    return all(name in scores and low <= scores[name] <= high for name, (low, high) in BAND.items())


def people_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """All scores of all searchers on people's searches; of what was trained several times the mean and its interval."""
    runs: dict[str, list[Mapping[str, float]]] = {}
    for name, own in scores.items():
        runs.setdefault(name.partition(", run ")[0], []).append(own)
    rows = []
    for name, every in runs.items():
        held = sum(map(in_band, every))
        cells = [_score(score, [own[score] for own in every]) if score in every[0] else "" for score in _SCORES]
        rows.append([name, *cells, f"{held} of {len(every)} runs" if len(every) > 1 else "yes" if held else "no"])
    bars = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in BAND.items())
    return Table(f"People's searches; asked beforehand, together: {bars}", ["predictor", *_SCORES, "all asked"], rows)
