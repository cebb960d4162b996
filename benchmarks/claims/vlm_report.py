"""What follows from answers of several training runs: differences of methods on the same questions, claims, shares."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.claims.paired import Comparison, compare_runs, holm, judged
from benchmarks.claims.report import Claim
from benchmarks.claims.scene_vlm import Answer, Results, shares

__all__ = ["Pair", "Quantity", "claims", "differences", "in_words", "share"]

Quantity = Literal["right", "follows", "both"]


@dataclass(frozen=True)
class Pair:
    """A claim to hold answers against: one method's share of a quantity over another's, or (sign -1) under it."""

    claim: str
    published: str
    quantity: Quantity
    method: str
    over: str
    sign: int = 1


def share(runs: Sequence[Sequence[Answer]], quantity: Quantity, where: Sequence[bool] | None = None) -> float:
    """Over all runs and questions."""
    return statistics.fmean(itertools.chain.from_iterable(shares(runs, quantity, where)))


def differences(
    results: Results,
    pairs: Sequence[tuple[str, str, Quantity]],
    wheres: Sequence[Sequence[bool] | None] = (None,),
) -> list[tuple[Comparison, float]]:
    """For each pair (method, over, quantity) and each choice of questions the difference, and p adjusted for them all.

    Args:
        results: The answers.
        pairs: What is compared.
        wheres: Of each choice, which questions it takes; None takes all.
    """
    found = [
        compare_runs(shares(results[method], quantity, where), shares(results[over], quantity, where))
        for (method, over, quantity), where in itertools.product(pairs, wheres)
    ]
    return list(zip(found, holm([own.p for own in found]), strict=True))


def in_words(found: Comparison, p: float) -> str:
    """A difference of shares, as tables print it."""
    low, high = found.interval
    counts = f"{found.better} gained and {found.worse} lost of {found.n}"
    return f"{found.difference:+.1%} ({low:+.1%} to {high:+.1%}), {counts}, p = {p:.2g}"


def claims(results: Results, asked: Sequence[Pair], seeds: tuple[int, int]) -> list[Claim]:
    """All claims, p adjusted for their number.

    Args:
        results: The answers.
        asked: What is claimed.
        seeds: The first and the last of the training runs.
    """
    compared = differences(results, [(own.method, own.over, own.quantity) for own in asked])
    rows = []
    for own, (found, p) in zip(asked, compared, strict=True):
        before, now = share(results[own.over], own.quantity), share(results[own.method], own.quantity)
        low, high = sorted(own.sign * bound for bound in found.interval)
        rows.append(
            Claim(
                own.claim,
                own.published,
                f"{before:.1%} → {now:.1%}: {in_words(found, p)}",
                judged(found, p, own.sign),
                found.n,
                seeds,
                own.sign * found.difference,
                (low, high),
                p,
            )
        )
    return rows
