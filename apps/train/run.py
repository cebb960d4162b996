"""A training from the options to its last checkpoint: everything is checked, then built, then `Trainer` works."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import stderr
from ..errors import UsageError
from ..labelled import Labelled, unreadable
from ..models import ModelChoice, resolve
from ..options import Machine
from ..run import cores
from .checkpoint import VAL, Folder, Record, differences
from .network import Built, Start, build
from .progress import require_tensorboard
from .settings import Learning, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .data import Parts
    from .trainer import Trainer

__all__ = ["Order", "run"]

_NAMED = 20  # pictures that cannot be read, on the screen


@dataclass(frozen=True)
class Order:
    """What the user asked for.

    Attributes:
        data: What is learned from.
        output: Folder for everything.
        start: Which network, by which method.
        learning: How.
        val_share: Share of each class to measure on, of data that are not divided.
        skip_unreadable: Leave out pictures that cannot be read.
        save_every: Steps between states within an epoch; None for one an epoch.
        tensorboard: Also log for TensorBoard.
        overwrite: Begin anew where a run was.
    """

    data: str
    output: str
    start: Start
    learning: Learning
    val_share: float
    skip_unreadable: bool
    save_every: int | None
    tensorboard: bool
    overwrite: bool

    def check(self) -> None:
        """Finds mistakes before anything is loaded.

        Raises:
            UsageError: What, and what to do.
        """
        self.learning.check()
        self.start.check()
        if self.tensorboard:
            require_tensorboard()


def run(order: Order, machine: Machine, as_json: bool) -> int:
    """Trains, or goes on training.

    Args:
        order: What the user asked for.
        machine: What may be taken of the machine.
        as_json: The outcome as JSON on stdout.

    Returns:
        0.

    Raises:
        UsageError: It cannot start as it was ordered.
        Stopped: It ended early.
    """
    order.check()
    accelerator = _accelerator(machine, leaves_out=order.start.method in ("dcal", "sparsifiner"))
    folder = Folder(order.output, accelerator.is_main_process)
    try:
        trainer = _prepare(order, machine, accelerator, folder)
        outcome = trainer.work()
        if accelerator.is_main_process:
            _tell(outcome, order.output, as_json)
    finally:
        folder.close()
        accelerator.end_training()
    return 0


def _accelerator(machine: Machine, leaves_out: bool) -> Accelerator:
    """accelerate's view of devices, precision and processes; `leaves_out`: some weights have no gradient."""
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    if machine.device not in ("auto", "cpu"):
        raise UsageError(
            f"--device {machine.device}: training takes auto or cpu; choose a GPU by CUDA_VISIBLE_DEVICES=1, several "
            "by accelerate launch"
        )
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    waits = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))  # while the first process reads all pictures
    replicas = DistributedDataParallelKwargs(find_unused_parameters=leaves_out)
    half = "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else "fp16"
    return Accelerator(
        cpu=machine.device == "cpu",
        mixed_precision=half if machine.amp else None,
        kwargs_handlers=[waits, replicas],
    )


def _default_workers(device: str) -> int:
    """How many decode processes suit a kind of device; on a CPU they compete with the network, at its priority."""
    return min(16, cores()) if device != "cpu" else max(1, min(8, cores() // 2))


def _prepare(order: Order, machine: Machine, accelerator: Accelerator, folder: Folder) -> Trainer:
    """Data, network and record of a run."""
    from .data import parts
    from .trainer import Trainer

    note: Callable[[str], None] = _note if accelerator.is_main_process else lambda _: None  # said once, by the first
    workers = _default_workers(accelerator.device.type) if machine.workers is None else machine.workers
    found = parts(order.data, order.val_share, order.learning.seed, note)
    with accelerator.main_process_first():  # which fetches weights for all
        built = build(order.start, found.train.classes, order.learning.seed, note)
    if accelerator.is_main_process:
        _record(order, folder, _settings(order, found, built, str(accelerator.mixed_precision)), found, workers, note)
    accelerator.wait_for_everyone()
    record = folder.record()
    if record is None:
        raise UsageError(f"{order.output} is not seen by all processes; choose an -o on a file system that they share")
    found = _without(found, record.left_out)
    if accelerator.is_main_process and (text := found.val_list()) is not None:
        folder.write(VAL, text)
    recipe = order.learning.recipe(len(found.train), order.start.brings_weights)
    if recipe.batch_size < accelerator.num_processes:
        raise UsageError(
            f"--batch-size {recipe.batch_size} is over all processes, of which there are {accelerator.num_processes}; "
            f"try {8 * accelerator.num_processes}"
        )
    note(_about(found, built, order.learning, recipe))
    if accelerator.num_processes > 1:
        note(f"{accelerator.num_processes} processes, which share each step's pictures")
    return Trainer(order, built, found, recipe, accelerator, folder, workers)


def _settings(order: Order, found: Parts, built: Built, precision: str) -> dict[str, Any]:
    """All that the weights depend on; speed (workers, device, threads, processes) is not part of it."""
    return {
        "train": _digest(found.train),
        "val": _digest(found.val),
        "classes": list(found.train.classes),
        **asdict(order.start),
        "weights": built.identity,
        "teacher_weights": None if order.start.teacher is None else resolve(ModelChoice(order.start.teacher)).identity,
        **asdict(order.learning),
        "val_share": order.val_share,
        "skip_unreadable": order.skip_unreadable,
        "precision": precision,
    }


def _digest(data: Labelled) -> str:
    digest = hashlib.sha256()
    for source, target in zip(data.sources, data.targets, strict=True):
        digest.update(f"{source.key}\0{target}\n".encode("utf-8", "surrogateescape"))
    return f"{len(data)} pictures, {digest.hexdigest()[:12]}"


def _record(
    order: Order, folder: Folder, settings: dict[str, Any], found: Parts, workers: int, note: Callable[[str], None]
) -> None:
    """Finds that the run in the folder is this one, or begins it there."""
    settings = json.loads(json.dumps(settings))
    if order.overwrite:
        folder.clear()
    record = folder.record()
    if record is not None and folder.has_state() and (differ := differences(record.settings, settings)):
        raise UsageError(
            f"{order.output} holds a training with other settings: {'; '.join(differ)}. Choose another -o, or "
            "--overwrite it"
        )
    if record is not None and record.settings == settings:
        return
    left_out = {**unreadable(found.train, workers), **unreadable(found.val, workers)}
    if left_out:
        _report(left_out, order.skip_unreadable, note)
    folder.begin(Record(settings, left_out))


def _report(left_out: dict[str, str], skips: bool, note: Callable[[str], None]) -> None:
    for name, reason in list(left_out.items())[:_NAMED]:
        note(f"unreadable: {name}: {reason}")
    if len(left_out) > _NAMED:
        note(f"and {len(left_out) - _NAMED:,} more")
    if not skips:
        raise UsageError(
            f"{len(left_out):,} pictures cannot be read; mend or remove them, or leave them out with --skip-unreadable"
        )
    note(f"{len(left_out):,} pictures are left out; settings.json names them")


def _without(found: Parts, left_out: dict[str, str]) -> Parts:
    """Both parts without pictures that cannot be read."""
    from ..batch.sources import encode_path
    from .data import Parts

    def readable(data: Labelled, part: str) -> Labelled:
        kept = data.take(i for i, source in enumerate(data.sources) if encode_path(source.name) not in left_out)
        if not kept or (part == "train" and not all(kept.counts())):
            raise UsageError(f"{data.where} has a class, or all of {part}, without a picture that can be read")
        return kept

    if not left_out:
        return found
    return Parts(readable(found.train, "train"), readable(found.val, "val"), found.is_held_out)


def _about(found: Parts, built: Built, learning: Learning, recipe: Recipe) -> str:
    count = sum(parameter.numel() for parameter in built.module.parameters())
    return (
        f"{built.label}, {count / 1e6:.1f} M parameters; {len(found.train.classes)} classes, {len(found.train):,} "
        f"pictures to learn from, {len(found.val):,} to measure on; {learning.epochs} epochs of {recipe.steps} steps, "
        f"batch {recipe.batch_size}, {learning.opt} at {recipe.lr:.2g}"
        + (f", layer decay {recipe.layer_decay:g}" if recipe.layer_decay < 1 else "")
        + (", averaged weights" if recipe.ema else "")
    )


def _tell(outcome: dict[str, Any], output: str, as_json: bool) -> None:
    best = Path(output) / "best"
    stderr.print(
        f"best after epoch {outcome['best_epoch']}: top-1 {outcome['best_top1']:.2%} → {best}   "
        f"(attnsuite classify … --model local-dir:{best})",
        markup=False,
        style="green",
    )
    if as_json:
        print(json.dumps({"output": os.fspath(output), **outcome}))


def _note(message: str) -> None:
    stderr.print(message, markup=False)
