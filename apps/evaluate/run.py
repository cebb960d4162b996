"""An evaluation from the options to the report."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..batch.engines import Rest, Stop, run_local
from ..batch.sinks import CsvSink
from ..batch.sources import Source
from ..batch.stage import COMMON_COLUMNS, Compute, Row, pick_device
from ..console import FetchBar, RunReport
from ..errors import Interrupted, Stopped, UsageError
from ..labelled import Labelled, find, splits
from ..models import ModelChoice, Network
from ..options import Batches
from ..run import default_workers
from .classes import Matched, match
from .corruptions import Sample, read_corruptions, read_severities, require_library
from .measure import read_metrics
from .reference import Reference, read_reference
from .report import FILES, Findings, print_table, write_files
from .stage import Evaluate, Plan

__all__ = ["Order", "run"]

_CPU_BATCH, _GPU_BATCH = 32, 128
_NAMED = 10  # pictures that could not be read, on the screen


@dataclass(frozen=True)
class Order:
    """What the user asked for, as it was written.

    Attributes:
        data: Folder, CSV or shards.
        split: Part of the data.
        in_order: Classes by order, not by name.
        metrics: Names, or None for those that apply.
        corruptions: Names, or None for none.
        severities: Such as `1-5`.
        reference: File with another network's errors.
    """

    data: str
    split: str | None
    in_order: bool
    metrics: str | None
    corruptions: str | None
    severities: str
    reference: str | None

    def corrupting(self) -> tuple[tuple[str, ...], tuple[int, ...], Reference | None]:
        """Corruptions, severities and reference, checked before anything is loaded.

        Raises:
            UsageError: Something is wrong with them.
        """
        names, severities = read_corruptions(self.corruptions), read_severities(self.severities)
        if self.reference is None:
            return names, severities, None
        if not names:
            raise UsageError("--reference is about corruptions; add --corruptions common")
        if self.metrics is not None and "top1" not in [name.strip() for name in self.metrics.split(",")]:
            raise UsageError("--reference needs the top-1 error; add top1 to --metrics")
        return names, severities, read_reference(self.reference, names, severities)

    def find(self, note: Callable[[str], None]) -> Labelled:
        """The labelled pictures; of divided data the part that was asked for, else `val`, else `test`.

        Raises:
            UsageError: There are none.
        """
        split = self.split
        if split is None and (parts := splits(self.data)):
            split = next((name for name in ("val", "test") if name in parts), None)
            if split is None:
                raise UsageError(
                    f"{self.data} has only the part {parts[0]!r}; to evaluate on it, add --split {parts[0]}"
                )
            note(f"evaluating on the part {split!r}")
        return find(self.data, split)


def run(order: Order, model: ModelChoice, machine: Batches, output: str | None, as_json: bool, overwrite: bool) -> int:
    """Evaluates a network.

    Args:
        order: What on, and what is measured.
        model: Which network.
        machine: What may be taken of the machine.
        output: Folder for files.
        as_json: JSON on stdout instead of a table.
        overwrite: Replace the files of an earlier evaluation.

    Returns:
        0, or 1 if a picture could not be read.

    Raises:
        UsageError: It cannot start as it was ordered.
        Stopped: It ended early.
    """
    report = RunReport()
    corruptions, severities, reference = order.corrupting()
    if output is not None:
        _prepare(output, overwrite)
    data = order.find(report.note)
    resolved = model.resolve()
    device = pick_device(machine.device)
    with FetchBar(resolved.label) as progress:
        network = resolved.load(progress)
    matched = match(data.classes, network, order.in_order)
    metrics, left_out = read_metrics(order.metrics, matched.count)
    for line in (_about(data, network, matched), left_out):
        if line:
            report.note(line)
    if corruptions:
        require_library(network.data_config["input_size"][1:])
    plan = Plan(_samples(data, matched), corruptions, severities if corruptions else ())
    stage = _stage(network, machine, device, plan, metrics)
    workers = default_workers() if machine.workers is None else machine.workers
    failed = _work(stage, plan, workers, report, output)
    facts = {
        "data": data.where, "model": network.label, "weights": resolved.identity, "classes": len(data.classes),
        "classes_of_model": matched.count, "classes_matched_by": matched.how, "pictures": len(data),
        "unreadable": len(failed.clean), "failed_when_corrupted": len(failed.corrupted), "amp": machine.amp,
    }  # fmt: skip
    findings = Findings(facts, network.labels, sorted(matched.targets), stage.measures, reference)
    return _tell(findings, failed, report, output, as_json)


def _stage(network: Network, machine: Batches, device: torch.device, plan: Plan, metrics: Sequence[str]) -> Evaluate:
    batch_size = machine.batch(_CPU_BATCH if device.type == "cpu" else _GPU_BATCH)
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    return Evaluate(network, Compute(device, machine.amp, batch_size=batch_size), plan, metrics)


def _prepare(folder: str, overwrite: bool) -> None:
    """Makes the output folder, or finds that it may not be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"no permission to write into {folder}")
    there = [name for name in FILES if os.path.lexists(os.path.join(folder, name))]
    if there and not overwrite:
        raise UsageError(f"{os.path.join(folder, there[0])} exists; choose another -o, or --overwrite what is there")


def _clear(folder: str) -> None:
    """Takes away what an earlier evaluation wrote, so that no report is of two."""
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))


def _samples(data: Labelled, matched: Matched) -> list[Sample]:
    given = [{field.name: getattr(source, field.name) for field in fields(Source)} for source in data.sources]
    return [
        Sample(**source, target=matched.targets[number]) for source, number in zip(given, data.targets, strict=True)
    ]


def _about(data: Labelled, network: Network, matched: Matched) -> str:
    """What the user should know of the classes."""
    how = {"name": "by name", "index": "by number", "order": "in order"}[matched.how]
    line = f"{len(data):,} pictures of {len(data.classes):,} classes, found in {network.label} {how}"
    if len(data.classes) < matched.count:
        line += f"; it has {matched.count:,} and may answer with any of them"
    return line


class _Failed:
    """Pictures that gave no prediction, with the reason."""

    def __init__(self) -> None:
        self.clean: list[str] = []
        self.corrupted: list[str] = []
        self._unreadable: set[str] = set()

    def add(self, source: Source, row: Row) -> None:
        assert isinstance(source, Sample)
        if source.corruption is None:
            self.clean.append(f"{row['path']}: {row['error']}")
            self._unreadable.add(source.name)
        elif source.name not in self._unreadable:
            self.corrupted.append(f"{row['path']} ({source.corruption} {source.severity}): {row['error']}")


def _work(stage: Evaluate, plan: Plan, workers: int, report: RunReport, output: str | None) -> _Failed:
    """Runs over the whole plan; predictions of pictures as they are go to a file as they come."""
    failed = _Failed()
    sink = None if output is None else CsvSink(os.path.join(output, "predictions.csv"), COMMON_COLUMNS + stage.columns)
    done = 0

    def emit(sources: Sequence[Source], rows: list[Row]) -> None:
        nonlocal done
        for source, row in zip(sources, rows, strict=True):
            if row["status"] == "error":
                failed.add(source, row)
        if sink is not None:
            sink.append([r for s, r in zip(sources, rows, strict=True) if getattr(s, "corruption", None) is None])
        done += len(rows)
        report.advance(len(rows))

    try:
        if sink is not None:
            _clear(os.path.dirname(sink.path))
            sink.begin(0)
        report.start(range(len(plan)), 0)
        with Stop() as stop:
            rest = Rest(iter(plan), plan, 0)
            run_local(stage, rest, emit, stop, batch_size=stage.compute.batch_size, workers=workers)
        if stop.signum is not None and done < len(plan):
            raise Interrupted(f"stopped after {done:,} of {len(plan):,} predictions; nothing is reported", stop.signum)
        if sink is not None:
            sink.finish()
    except OSError as error:
        raise Stopped(f"cannot write {error.filename or output}: {error.strerror}") from error
    finally:
        report.stop()
        if sink is not None:
            sink.close()
    return failed


def _tell(findings: Findings, failed: _Failed, report: RunReport, output: str | None, as_json: bool) -> int:
    """The report, and what is missing in it; the exit code."""
    if as_json:
        print(json.dumps(findings.as_dict(), ensure_ascii=False))
    else:
        print_table(findings)
    if output is not None:
        try:
            written = write_files(output, findings)
        except OSError as error:
            raise Stopped(f"cannot write {error.filename or output}: {error.strerror}") from error
        report.note(f"{', '.join(['predictions.csv', *written])} → {output}")
    _note_failed(report, failed.clean, "could not be read and are in no figure")
    _note_failed(report, failed.corrupted, "gave no prediction when corrupted and are in no figure")
    return 1 if failed.clean or failed.corrupted else 0


def _note_failed(report: RunReport, lines: Sequence[Any], what: str) -> None:
    if not lines:
        return
    report.note(f"pictures that {what}: {len(lines):,}")
    for line in lines[:_NAMED]:
        report.note(f"  {line}")
    if len(lines) > _NAMED:
        report.note(f"  and {len(lines) - _NAMED:,} more")
