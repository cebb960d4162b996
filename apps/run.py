"""Puts a verb's stage, its inputs and its output together and runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .batch.engines import Engine, run_local
from .batch.job import Job, Screen, Summary, check_output
from .batch.processor import has_bfloat16
from .batch.stage import Compute, Stage, pick_device
from .console import FetchBar, RowTable, RowText, RunReport, print_summary
from .errors import UsageError
from .options import Distributed, Machine, Reading, Writing

if TYPE_CHECKING:
    from .batch.sources import Inputs
    from .models import Network

__all__ = ["Choice", "Resolved", "RunOptions", "cores", "default_workers", "finish", "run"]


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
        distributed: Which engine, and what may be taken of a cluster.
    """

    reading: Reading
    model: Choice
    writing: Writing
    machine: Machine
    distributed: Distributed = field(default_factory=Distributed)


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
    options.distributed.check(options.machine)
    reading, writing, machine = options.reading, options.writing, options.machine
    if writing.output is not None:
        check_output(writing.output, parts=True)
    if writing.part_rows is not None and not (writing.output or "").endswith("/"):
        raise UsageError("--rows-per-part is about a folder of Parquet files: give one, -o DIR/")
    inputs = reading.find(report.note)
    output = writing.output if inputs.shard is None or writing.output is None else inputs.shard.part(writing.output)
    resolved = options.model.resolve()
    device, on_gpu = _place(options.distributed, machine.device)
    compute = machine.compute(device, on_gpu, gpu_batch if on_gpu else cpu_batch)
    if machine.amp and device.type == "cpu" and not has_bfloat16():
        report.note("--amp: this processor has no instructions for bfloat16, so it is slower with --amp than without")

    def make_stage() -> Stage:
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        stage = make(_load(resolved), compute, inputs)
        if machine.reduces:
            stage.decoder = stage.decoder.reduced()
        return stage

    # All that the rows depend on; speed (batch size, workers, device, engine) is not part of it.
    command = {
        "verb": verb, "model": resolved.label, "weights": resolved.identity, **reading.facts(), "amp": machine.amp,
        **settings, **({"fast_decode": True} if machine.reduces else {}),
    }  # fmt: skip
    engine = _engine(options, compute, report)
    job = Job(inputs, make_stage, command, report, engine, writing.resume, writing.overwrite, writing.part_rows)
    if output is not None:
        return job.to_file(output)
    return job.to_screen(screen or _screen(writing.as_json))


def finish(summary: Summary, as_json: bool) -> int:
    """Says what came of a run; its exit code."""
    print_summary(summary, as_json)
    return 1 if summary.failed else 0


def _engine(options: RunOptions, compute: Compute, report: RunReport) -> Engine:
    machine, distributed = options.machine, options.distributed
    common: dict[str, Any] = {"batch_size": compute.batch_size, "read_timeout": options.reading.read_timeout}
    if distributed.engine == "local":
        workers = default_workers() if machine.workers is None else machine.workers
        return partial(run_local, workers=workers, **common)
    from .batch.cluster import Cluster, check_address, run_ray

    if distributed.ray_address is not None:
        check_address(distributed.ray_address)

    cluster = Cluster(
        distributed.ray_address,
        distributed.num_workers,
        distributed.cpus_per_worker or 1,
        distributed.gpus_per_worker,
        distributed.memory_per_worker,
        machine.device,
    )
    return partial(run_ray, cluster=cluster, note=report.note, **common)


def _place(distributed: Distributed, device: str) -> tuple[torch.device, bool]:
    """Where this process holds the network, and whether GPUs run it; with Ray, workers pick devices of their own."""
    if distributed.engine == "ray":
        return torch.device("cpu"), bool(distributed.gpus_per_worker) or device.startswith("cuda")
    picked = pick_device(device)
    return picked, picked.type != "cpu"


def _load(resolved: Resolved) -> Network:
    with FetchBar(resolved.label) as progress:
        return resolved.load(progress)


def _screen(as_json: bool) -> Screen:
    if as_json:
        return RowText(sys.stdout, "json")
    return RowTable() if sys.stdout.isatty() else RowText(sys.stdout, "csv")


def default_workers() -> int:
    """How many decode processes suit this machine: one a core, since they only take what the network leaves."""
    return min(16, cores())


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
