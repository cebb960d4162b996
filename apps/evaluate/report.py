"""What an evaluation found: on the screen, as JSON, and as files of a folder."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .measure import ClassScore, Measures, Score, class_scores
from .reference import Reference, corruption_errors
from .stage import Variant

__all__ = ["FILES", "Findings", "print_table", "write_files"]

FILES = ("metrics.json", "predictions.csv", "per_class.csv", "confusion.csv", "confusion.png")

_NAMES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "ece": "expected calibration error"}


@dataclass(frozen=True)
class Findings:
    """All that was measured.

    Attributes:
        facts: What of: data, model, classes, counts of pictures.
        labels: All labels of the network.
        targets: The data's classes among them, in the network's order.
        measures: For pictures as they are (None) and each corruption and severity.
        reference: Errors of another network, if they were given.
    """

    facts: Mapping[str, Any]
    labels: Sequence[str]
    targets: Sequence[int]
    measures: Mapping[Variant, Measures]
    reference: Reference | None = None

    @property
    def clean(self) -> dict[str, Score]:
        """The metrics of pictures as they are."""
        return self.measures[None].scores()

    @property
    def confusion(self) -> torch.Tensor | None:
        """Counts `[right class, predicted class]` of pictures as they are."""
        return self.measures[None].confusion

    def corrupted(self) -> dict[str, dict[int, dict[str, Score]]]:
        """For each corruption and severity the metrics."""
        made: dict[str, dict[int, dict[str, Score]]] = {}
        for variant, measures in self.measures.items():
            if variant is not None:
                made.setdefault(variant[0], {})[variant[1]] = measures.scores()
        return made

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; null stands for what could not be measured."""
        made: dict[str, Any] = {**self.facts, "metrics": {name: _plain(score) for name, score in self.clean.items()}}
        corrupted = self.corrupted()
        if corrupted:
            made["corruptions"] = {
                name: {str(severity): {m: _plain(s) for m, s in scores.items()} for severity, scores in of.items()}
                for name, of in corrupted.items()
            }
            made["corruption_summary"] = self.summary()
        return made

    def summary(self) -> dict[str, Any]:
        """Mean errors over severities and corruptions; with a reference, mCE and relative mCE as fractions."""
        errors = {
            name: {severity: 1 - scores["top1"].value for severity, scores in of.items() if "top1" in scores}
            for name, of in self.corrupted().items()
        }
        mean = {name: statistics.fmean(of.values()) for name, of in errors.items() if of}
        if not mean:
            return {}
        made: dict[str, Any] = {"mean_error": {name: _number(value) for name, value in mean.items()}}
        made["mean_error_of_all"] = _number(statistics.fmean(mean.values()))
        if self.reference is not None:
            ces = corruption_errors(errors, 1 - self.clean["top1"].value, self.reference)
            made["corruption_errors"] = {n: {k: _number(v) for k, v in of.items()} for n, of in ces.items()}
            for kind, name in (("ce", "mce"), ("relative_ce", "relative_mce")):
                values = [of[kind] for of in ces.values()]
                made[name] = None if None in values else _number(statistics.fmean(v for v in values if v is not None))
        return made


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 6)


def _plain(score: Score) -> dict[str, Any]:
    return {name: _number(value) if name != "n" else value for name, value in asdict(score).items()}


def print_table(findings: Findings) -> None:
    """The metrics on stdout, with intervals; those of corruptions below, a line for each."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000
    table = Table(box=None, padding=(0, 3, 0, 0))
    for header in ("metric", "value", "95 % interval", "n"):
        table.add_column(header, justify="left" if header == "metric" else "right", no_wrap=True)
    for name, score in findings.clean.items():
        table.add_row(_NAMES[name], _percent(score.value), _interval(score), f"{score.n:,}")
    console.print(table)
    corrupted = findings.corrupted()
    if corrupted:
        console.print()
        console.print(_corruption_table(findings, corrupted))
        _print_summary(console, findings.summary())


def _corruption_table(findings: Findings, corrupted: Mapping[str, Mapping[int, Mapping[str, Score]]]) -> Any:
    from rich.table import Table

    summary = findings.summary()
    metric = next(
        name for name in ("top1", "top5", "ece") if name in next(iter(next(iter(corrupted.values())).values()))
    )
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column(f"{_NAMES[metric]} at severity", no_wrap=True)
    severities = list(next(iter(corrupted.values())))
    for header in [*map(str, severities), "mean error", *(["CE"] if "mce" in summary else [])]:
        table.add_column(header, justify="right", no_wrap=True)
    for name, of in corrupted.items():
        cells = [_percent(scores[metric].value) for scores in of.values()]
        cells.append(_percent(summary.get("mean_error", {}).get(name)))
        if "mce" in summary:
            cells.append(_percent(summary["corruption_errors"][name]["ce"]))
        table.add_row(name, *cells)
    return table


def _print_summary(console: Any, summary: Mapping[str, Any]) -> None:
    if "mean_error_of_all" in summary:
        console.print(f"mean error over corruptions {_percent(summary['mean_error_of_all'])}")
    if "mce" in summary:
        console.print(f"mCE {_percent(summary['mce'])}, relative mCE {_percent(summary['relative_mce'])}")


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def _interval(score: Score) -> str:
    return "" if score.low is None or score.high is None else f"{100 * score.low:.2f} – {100 * score.high:.2f}"


def write_files(folder: str, findings: Findings) -> list[str]:
    """Writes all but the predictions, each whole or not at all.

    Args:
        folder: Is there already.
        findings: What was measured.

    Returns:
        Names of the files.
    """
    written = ["metrics.json"]
    _write(folder, "metrics.json", json.dumps(findings.as_dict(), indent=1, ensure_ascii=False) + "\n")
    confusion = findings.confusion
    if confusion is not None:
        scores = class_scores(confusion, findings.targets)
        _write(folder, "per_class.csv", _csv(_class_rows(scores, findings.labels)))
        _write(folder, "confusion.csv", _csv(_confusion_rows(confusion, findings)))
        _draw(folder, confusion, findings)
        written += ["per_class.csv", "confusion.csv", "confusion.png"]
    return written


def _class_rows(scores: Sequence[ClassScore], labels: Sequence[str]) -> Iterable[list[Any]]:
    yield ["class", "index", "n", "accuracy", "low", "high", "taken_for", "taken_for_count"]
    for score in scores:
        accuracy = score.accuracy
        other = "" if score.taken_for is None else labels[score.taken_for]
        numbers = [_number(value) for value in (accuracy.value, accuracy.low, accuracy.high)]
        yield [labels[score.index], score.index, accuracy.n, *numbers, other, score.taken]


def _confusion_rows(confusion: torch.Tensor, findings: Findings) -> Iterable[list[Any]]:
    """The data's classes by theirs and by all others that were predicted."""
    others = set(confusion.sum(dim=0).nonzero().flatten().tolist()) - set(findings.targets)
    columns = [*findings.targets, *sorted(others)]
    yield ["class", *(findings.labels[index] for index in columns)]
    for target in findings.targets:
        yield [findings.labels[target], *confusion[target, columns].tolist()]


def _draw(folder: str, confusion: torch.Tensor, findings: Findings) -> None:
    from .draw import draw_confusion

    targets = list(findings.targets)
    rows = confusion[targets]
    inside = rows[:, targets]
    counts = torch.cat([inside, rows.sum(dim=1, keepdim=True) - inside.sum(dim=1, keepdim=True)], dim=1)
    n = int(rows.sum())
    right = int(inside.diagonal().sum())
    title = f"{findings.facts['model']}: {right:,} of {n:,} right"
    picture = draw_confusion(counts.numpy(), [findings.labels[target] for target in targets], title)
    path = os.path.join(folder, "confusion.png")
    picture.save(path + ".part", format="PNG")
    os.replace(path + ".part", path)


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    import io

    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(["" if cell is None else cell for cell in row] for row in rows)
    return stream.getvalue()


def _write(folder: str, name: str, content: str) -> None:
    path = os.path.join(folder, name)
    with open(path + ".part", "w", encoding="utf-8", newline="") as file:
        file.write(content)
    os.replace(path + ".part", path)
