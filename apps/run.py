"""Puts a verb's stage, its inputs and its output together and runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .batch.job import Job, Screen, Summary, check_output
from .batch.stage import Compute, Stage, pick_device
from .console import FetchBar, RowTable, RowText, RunReport, print_summary
from .options import Machine, Reading, Writing

if TYPE_CHECKING:
    from .batch.sources import Inputs
    from .models import Network

__all__ = ["Choice", "Resolved", "RunOptions", "default_workers", "finish", "run"]


class Resolved(Protocol):
    """A model whose names are right and that is not loaded yet.

    Attributes:
        label: What rows call it.
        identity: Text that differs for other weights.
    """

    @property
    def label(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def load(self, progress: Callable[[int, int | None], None]) -> Network:
        """Builds the network; `progress` is told the bytes received and the bytes in all while weights are fetched."""
        ...


class Choice(Protocol):
    """A model as the user named it."""

    def resolve(self) -> Resolved:
        """Checks its names without building anything."""
        ...


@dataclass(frozen=True)
class RunOptions:
    """What every verb over images takes.

    Attributes:
        reading: Which images.
        model: Which model.
        writing: Where rows go.
        machine: What may be taken of the machine.
    """

    reading: Reading
    model: Choice
    writing: Writing
    machine: Machine


def run(
    verb: str,
    options: RunOptions,
    make: Callable[[Network, Compute, Inputs], Stage],
    settings: dict[str, Any],
    gpu_batch: int = 128,
    cpu_batch: int = 32,
    screen: Screen | None = None,
) -> Summary:
    """Checks everything that can be checked, then runs a verb.

    Args:
        verb: Its name.
        options: What the user asked for.
        make: Makes the stage from the loaded network.
        settings: The verb's own options that change rows, for the ledger.
        gpu_batch: Pictures a batch on a GPU, unless the user says otherwise.
        cpu_batch: The same on a CPU.
        screen: Takes the rows where there is no output file; None for standard output.

    Returns:
        What came of it.

    Raises:
        UsageError: Something is wrong with the options, the inputs or the model.
        Stopped: The run ended early.
    """
    report = RunReport()
    reading, writing, machine = options.reading, options.writing, options.machine
    if writing.output is not None:
        check_output(writing.output)
    inputs = reading.find(report.note)
    output = writing.output if inputs.shard is None or writing.output is None else inputs.shard.part(writing.output)
    resolved = options.model.resolve()
    device = pick_device(machine.device)
    batch_size = machine.batch(cpu_batch if device.type == "cpu" else gpu_batch)
    compute = Compute(device, machine.amp, machine.compiles, batch_size)

    def make_stage() -> Stage:
        if machine.threads is not None:
            import torch

            torch.set_num_threads(machine.threads)
        return make(_load(resolved), compute, inputs)

    workers = default_workers(device.type) if machine.workers is None else machine.workers
    # All that the rows depend on; speed (batch size, workers, device, threads) is not part of it.
    command = {
        "verb": verb, "model": resolved.label, "weights": resolved.identity, **reading.facts(), "amp": machine.amp,
        **settings,
    }  # fmt: skip
    job = Job(
        inputs, make_stage, command, report, batch_size, workers, writing.resume, writing.overwrite,
        reading.read_timeout,
    )  # fmt: skip
    if output is not None:
        return job.to_file(output)
    return job.to_screen(screen or _screen(writing.as_json))


def finish(summary: Summary, as_json: bool) -> int:
    """Says what came of a run; its exit code."""
    print_summary(summary, as_json)
    return 1 if summary.failed else 0


def _load(resolved: Resolved) -> Network:
    with FetchBar(resolved.label) as progress:
        return resolved.load(progress)


def _screen(as_json: bool) -> Screen:
    if as_json:
        return RowText(sys.stdout, "json")
    return RowTable() if sys.stdout.isatty() else RowText(sys.stdout, "csv")


def default_workers(device: str) -> int:
    """How many decode processes suit a kind of device on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores) if device != "cpu" else max(1, min(8, cores // 2))
