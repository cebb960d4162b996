"""The format of `results/*.json`: what a paper claims, what was measured here, and what that says."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.claims.paired import Verdict

__all__ = ["RESULTS", "Claim", "Report", "Table", "digests"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """A row of the table of claims.

    Attributes:
        claim: What is claimed, in a sentence without a full stop.
        published: The paper's figures, and where they stand; "no figure" where it has none.
        ours: Our figures, as they are printed.
        verdict: What they say.
        n: Inputs that were compared.
        seeds: The first and the last seed.
        difference: In the direction of the claim.
        interval: Its 95 % interval.
        p: Adjusted for the number of claims of the report.
    """

    claim: str
    published: str
    ours: str
    verdict: Verdict
    n: int
    seeds: tuple[int, int]
    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Table:
    """Figures beside the claims, as they are printed."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Report:
    """One paper's claims, measured by one command.

    Attributes:
        method: Its name.
        paper: Title, authors, where.
        command: What measures it again.
        protocol: In a few sentences; the script has it in full.
        machine: As `benchmarks.machine.describe` gives it.
        claims: The rows.
        tables: Figures beside them.
        details: Whatever else the script keeps, settings and digests of weights among it.
    """

    method: str
    paper: str
    command: str
    protocol: str
    machine: dict[str, Any]
    claims: list[Claim]
    tables: list[Table] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            TypeError: If a field is missing or unknown.
        """
        report = json.loads(path.read_text(encoding="utf-8"))
        claims = [
            Claim(**{**claim, "seeds": tuple(claim["seeds"]), "interval": tuple(claim["interval"])})
            for claim in report.pop("claims")
        ]
        return cls(claims=claims, tables=[Table(**table) for table in report.pop("tables")], **report)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file of weights, so that figures can be told to be of these."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
