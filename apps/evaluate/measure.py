"""Accuracy, calibration and confusion by torchmetrics, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError

__all__ = ["METRICS", "ClassScore", "Measures", "Score", "class_scores", "read_metrics", "wilson"]

METRICS = ("top1", "top5", "ece", "confusion")
_MOST_CONFUSED = 5000  # classes; a matrix of more would take gigabytes
_BINS = 15


@dataclass(frozen=True)
class Score:
    """A number with its 95 % interval.

    Attributes:
        value: From 0 to 1; not a number where nothing was measured.
        low: Lower end of the interval; None where there is none.
        high: Upper end.
        n: Pictures it comes from.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class ClassScore:
    """How one class fares.

    Attributes:
        index: Index in the network's output.
        accuracy: Share of its pictures that are found, with interval.
        taken_for: The class that most of the others are taken for; None where all are right or it is not known.
        taken: How many.
    """

    index: int
    accuracy: Score
    taken_for: int | None
    taken: int


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion after Wilson (1927); (0, 1) of nothing.

    Of the usual intervals it is the one that stays inside 0 and 1 and holds its level with few pictures, where a
    bootstrap of an accuracy of 1 would give an interval of no width.
    """
    if not n:
        return 0.0, 1.0
    z = 1.959963984540054
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def read_metrics(text: str | None, classes: int) -> tuple[tuple[str, ...], str]:
    """Names separated by commas; None for all that say something about so many classes.

    Returns:
        The metrics, and what was left out and why, if anything.

    Raises:
        UsageError: An unknown name, or a metric that this many classes do not have.
    """
    wanted = METRICS if text is None else tuple(dict.fromkeys(w.strip() for w in text.split(",") if w.strip()))
    if unknown := [name for name in wanted if name not in METRICS]:
        raise UsageError(f"--metrics: there is no {unknown[0]!r}; there are {', '.join(METRICS)}")
    if not wanted:
        raise UsageError(f"--metrics names none; there are {', '.join(METRICS)}")
    out = {}
    if classes <= 5:
        out["top5"] = f"with {classes} classes it is always 1"
    if classes > _MOST_CONFUSED:
        out["confusion"] = f"a matrix of {classes:,} classes does not fit the memory"
    left_out = [name for name in wanted if name in out]
    if left_out and text is not None:
        raise UsageError(f"--metrics {left_out[0]}: {out[left_out[0]]}; leave it out")
    return tuple(n for n in wanted if n not in out), "; ".join(f"without {n}: {out[n]}" for n in left_out)


class Measures:
    """Collects predictions batch by batch.

    Args:
        classes: How many the network has.
        metrics: Some of `METRICS`.
    """

    def __init__(self, classes: int, metrics: Sequence[str]) -> None:
        from torchmetrics import classification as tm

        kinds: dict[str, Any] = {
            "top1": lambda: tm.MulticlassAccuracy(classes, average="micro"),
            "top5": lambda: tm.MulticlassAccuracy(classes, top_k=5, average="micro"),
            "ece": lambda: tm.MulticlassCalibrationError(classes, n_bins=_BINS, norm="l1"),
            "confusion": lambda: tm.MulticlassConfusionMatrix(classes),
        }
        self.n = 0
        self._classes = classes
        self._metrics = {name: kinds[name]() for name in metrics}

    def update(self, probabilities: torch.Tensor, targets: torch.Tensor) -> None:
        """Takes predictions in.

        Args:
            probabilities: `[B, classes]`.
            targets: `[B]`, indices of the right classes.
        """
        self.n += len(targets)
        for metric in self._metrics.values():
            metric.update(probabilities, targets)

    def scores(self) -> dict[str, Score]:
        """Every metric that is one number; accuracies with their interval."""
        made = {}
        for name, metric in self._metrics.items():
            if name == "confusion":
                continue
            value = float(metric.compute()) if self.n else math.nan
            right = round(value * self.n) if self.n else 0
            made[name] = Score(value, *((None, None) if name == "ece" else wilson(right, self.n)), self.n)
        return made

    @property
    def confusion(self) -> torch.Tensor | None:
        """Counts `[right class, predicted class]`, if they are collected."""
        metric = self._metrics.get("confusion")
        if metric is None:
            return None
        return metric.compute() if self.n else torch.zeros(self._classes, self._classes, dtype=torch.long)


def class_scores(confusion: torch.Tensor, targets: Sequence[int]) -> list[ClassScore]:
    """How each class of the data fares.

    Args:
        confusion: Counts `[right class, predicted class]`.
        targets: The data's classes, in the order wanted.
    """
    made = []
    for target in targets:
        row = confusion[target].clone()
        n, right = int(row.sum()), int(row[target])
        row[target] = 0
        taken = int(row.max())
        accuracy = Score(right / n if n else math.nan, *wilson(right, n), n)
        made.append(ClassScore(target, accuracy, int(row.argmax()) if taken else None, taken))
    return made
