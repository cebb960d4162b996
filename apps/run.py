"""Puts a verb's stage, its inputs and its output together and runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .batch.job import Job, Screen, Summary, check_output
from .batch.sources import Inputs, encode_path
from .batch.stage import Compute, Stage, pick_device
from .console import FetchBar, RowTable, RowText, RunReport
from .models import ModelChoice, Network, ResolvedModel, load, resolve

__all__ = ["RunOptions", "default_workers", "run"]


@dataclass(frozen=True)
class RunOptions:
    """What every verb over images takes.

    Attributes:
        inputs: Files, folders, patterns, archives.
        output: The output file, or None for the screen.
        model: The model.
        batch_size: Pictures a batch; None chooses by device.
        workers: Decode processes; None chooses by cores and device.
        device: Name of a device, or `auto`.
        amp: Half precision.
        compile: `torch.compile`.
        recursive: Search folders inside folders.
        glob: Pattern that file names must match.
        limit: Stop after so many inputs.
        as_json: JSON lines on stdout, or a JSON summary beside an output file.
        resume: Go on where the same command ended.
        overwrite: Replace what is there.
        threads: CPU threads of the network; None leaves them to torch.
    """

    inputs: Sequence[str]
    output: str | None = None
    model: ModelChoice = field(default_factory=ModelChoice)
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    amp: bool = False
    compile: bool = False
    recursive: bool = True
    glob: str | None = None
    limit: int | None = None
    as_json: bool = False
    resume: bool = True
    overwrite: bool = False
    threads: int | None = None


def run(
    verb: str,
    options: RunOptions,
    make: Callable[[Network, Compute, Inputs], Stage],
    settings: dict[str, Any],
    gpu_batch: int = 128,
    cpu_batch: int = 32,
) -> Summary:
    """Checks everything that can be checked, then runs a verb.

    Args:
        verb: Its name.
        options: What the user asked for.
        make: Makes the stage from the loaded network.
        settings: The verb's own options that change rows, for the ledger.
        gpu_batch: Pictures a batch on a GPU, unless the user says otherwise.
        cpu_batch: The same on a CPU.

    Returns:
        What came of it.

    Raises:
        UsageError: Something is wrong with the options, the inputs or the model.
        Stopped: The run ended early.
    """
    report = RunReport()
    if options.output is not None:
        check_output(options.output)
    inputs = Inputs(options.inputs, options.recursive, options.glob, options.limit, note=report.note)
    inputs.check()
    resolved = resolve(options.model)
    device = pick_device(options.device)
    batch_size = options.batch_size or (cpu_batch if device.type == "cpu" else gpu_batch)
    compute = Compute(device, options.amp, options.compile, batch_size)

    def make_stage() -> Stage:
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)
        return make(_load(resolved), compute, inputs)

    workers = default_workers(device.type) if options.workers is None else options.workers
    command = _command(verb, options, resolved, settings)
    job = Job(inputs, make_stage, command, report, batch_size, workers, options.resume, options.overwrite)
    if options.output is not None:
        return job.to_file(options.output)
    return job.to_screen(_screen(options.as_json))


def _load(resolved: ResolvedModel) -> Network:
    with FetchBar(resolved.label) as progress:
        return load(resolved, progress)


def _screen(as_json: bool) -> Screen:
    if as_json:
        return RowText(sys.stdout, "json")
    return RowTable() if sys.stdout.isatty() else RowText(sys.stdout, "csv")


def default_workers(device: str) -> int:
    """How many decode processes suit a kind of device on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores) if device != "cpu" else max(1, min(8, cores // 2))


def _command(verb: str, options: RunOptions, resolved: ResolvedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """All that the rows depend on; speed (batch size, workers, device, threads) is not part of it."""
    return {
        "verb": verb,
        "model": resolved.label,
        "weights": resolved.identity,
        "inputs": [encode_path(argument) for argument in options.inputs],
        "recursive": options.recursive,
        "glob": options.glob,
        "limit": options.limit,
        "amp": options.amp,
        **settings,
    }
