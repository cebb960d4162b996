"""Errors on corrupted pictures compared with another network's: the corruption error and its mean, mCE."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .corruptions import CORRUPTIONS, SEVERITIES

__all__ = ["Reference", "corruption_errors", "read_reference"]


@dataclass(frozen=True)
class Reference:
    """Errors of another network on the same data.

    Attributes:
        errors: For each corruption its mean error over the five severities, or the error at each.
        clean: Its error without corruption, if known.
    """

    errors: Mapping[str, float | Mapping[int, float]]
    clean: float | None = None

    def over(self, name: str, severities: Sequence[int]) -> float:
        """Mean error on a corruption over some severities."""
        error = self.errors[name]
        return sum(error[s] for s in severities) / len(severities) if isinstance(error, Mapping) else error

    def check(self, path: str, corruptions: Sequence[str], severities: Sequence[int]) -> None:
        """Finds out whether what will be measured can be compared.

        Raises:
            UsageError: A corruption is missing, or given at other severities.
        """
        if missing := [name for name in corruptions if name not in self.errors]:
            raise UsageError(
                f"--reference {path} has no error for {', '.join(missing)}; add it or leave it out of --corruptions"
            )
        for name in corruptions:
            error = self.errors[name]
            if isinstance(error, Mapping):
                if lacks := [severity for severity in severities if severity not in error]:
                    raise UsageError(
                        f"--reference {path}: {name} has no error at severity {lacks[0]}; see --severities"
                    )
            elif tuple(severities) != SEVERITIES:
                raise UsageError(
                    f"--reference {path}: the error for {name} is a mean over severities 1 to 5, so it needs "
                    "--severities 1-5; or give the five errors as a list"
                )


def read_reference(path: str, corruptions: Sequence[str], severities: Sequence[int]) -> Reference:
    """Reads `{"clean": 0.435, "gaussian_noise": 0.886, …}`, or the `metrics.json` of another evaluation.

    Args:
        path: A JSON file; a list has the errors at severities 1 to 5.
        corruptions: What will be measured, and must be there.
        severities: The same; a mean over all five cannot be compared with fewer.

    Raises:
        UsageError: The file cannot be read, lacks something, or holds what is no error from 0 to 1.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--reference {path} cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise UsageError(f'--reference {path}: expected an object such as {{"clean": 0.435, "gaussian_noise": 0.886}}')
    if "metrics" in given:
        given = _of_report(path, given)
    if unknown := sorted(set(given) - {*CORRUPTIONS, "clean"}):
        raise UsageError(f"--reference {path}: {unknown[0]!r} is no corruption; there are {', '.join(CORRUPTIONS)}")
    errors = {name: _error(path, name, value) for name, value in given.items()}
    clean = errors.pop("clean", None)
    if isinstance(clean, Mapping):
        raise UsageError(f"--reference {path}: 'clean' must be one number")
    reference = Reference(errors, clean)
    reference.check(path, corruptions, severities)
    return reference


def _of_report(path: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The top-1 errors in what `attnsuite evaluate` wrote."""
    try:
        made: dict[str, Any] = {"clean": 1 - report["metrics"]["top1"]["value"]}
        for name, by_severity in report.get("corruptions", {}).items():
            made[name] = {int(severity): 1 - scores["top1"]["value"] for severity, scores in by_severity.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"--reference {path}: this evaluation has no top-1 accuracies to compare with") from error
    return made


def _error(path: str, name: str, value: Any) -> float | Mapping[int, float]:
    by_severity: Any = value
    if isinstance(value, list) and len(value) == len(SEVERITIES):
        by_severity = dict(zip(SEVERITIES, value, strict=True))
    several = isinstance(by_severity, dict)
    for number in by_severity.values() if several else [by_severity]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
            raise UsageError(
                f"--reference {path}: {name} is {value!r}; expected an error from 0 to 1 (88.6 % is 0.886), or five of "
                "them"
            )
    return by_severity if several else float(by_severity)


def corruption_errors(
    errors: Mapping[str, Mapping[int, float]], clean: float, reference: Reference
) -> dict[str, dict[str, float | None]]:
    """The corruption error of Hendrycks and Dietterich (2019, arXiv:1903.12261) for each corruption.

    `CE = Σ_s E_s / Σ_s E_s^ref`, and relative to the clean error
    `Σ_s (E_s - E_clean) / Σ_s (E_s^ref - E_clean^ref)`. Their means over corruptions are mCE and relative mCE.

    Args:
        errors: For each corruption the error at each severity.
        clean: The error without corruption.
        reference: Errors of the network compared with.

    Returns:
        For each corruption `ce` and `relative_ce`; None where the divisor is zero or not known.
    """
    made: dict[str, dict[str, float | None]] = {}
    for name, by_severity in errors.items():
        ours = sum(by_severity.values()) / len(by_severity)
        theirs = reference.over(name, list(by_severity))
        worse = None if reference.clean is None else theirs - reference.clean
        made[name] = {
            "ce": ours / theirs if theirs else None,
            "relative_ce": (ours - clean) / worse if worse else None,
        }
    return made
