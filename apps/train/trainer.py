"""The training itself: steps, measurements, checkpoints, on one process or many that do the same."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..batch.engines import Stop
from ..errors import Interrupted, Stopped, UsageError
from . import data as read
from .checkpoint import LOG, Folder, save_network
from .data import Batch, Parts
from .methods import criterion_for, mixed, mixer_for, optimizer_for, scheduler_for
from .network import Built
from .progress import Bar, Board, log_text, say_epoch
from .settings import Recipe

if TYPE_CHECKING:
    from .run import Order

__all__ = ["Trainer", "memory_explained"]


@contextmanager
def memory_explained(batch: int, label: str) -> Iterator[None]:
    """Says what can be done about too little memory for a batch of this size, on a GPU or beside it.

    Raises:
        Stopped: Memory was too small.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_told = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_told and not re.search("(allocate|out of|not enough) memory", str(error)):
            raise
        remedy = f"--batch-size {batch // 2}, more processes" if batch > 1 else "a smaller --img-size or --model"
        raise Stopped(
            f"memory does not suffice for {batch} pictures a step of {label}; try {remedy}, or --amp"
        ) from error


class Trainer:
    """One training.

    All processes do the same steps on their shares of the same pictures; the first one writes. Randomness is seeded for
    each picture and each step, so there is no state of generators to keep.

    Args:
        order: What the user asked for.
        built: The network.
        found: The pictures.
        recipe: The settings, filled in.
        accelerator: Devices, precision, processes.
        folder: Where everything goes.
        workers: Processes that read pictures.
    """

    def __init__(
        self,
        order: Order,
        built: Built,
        found: Parts,
        recipe: Recipe,
        accelerator: Accelerator,
        folder: Folder,
        workers: int,
    ) -> None:
        from timm.utils import ModelEmaV3

        self._order, self._built, self._recipe = order, built, recipe
        self._learning = order.learning
        self._accelerator, self._folder = accelerator, folder
        self._classes = found.train.classes
        self._network = built.module.to(accelerator.device)
        self._mixer = mixer_for(self._learning, len(self._classes))
        smoothing = 0.0 if self._mixer is not None else self._learning.smoothing  # the mixer smooths what it mixes
        self._criterion = criterion_for(order.start, built, self._classes, smoothing).to(accelerator.device)
        self._own = [parameter for parameter in self._criterion.parameters() if parameter.requires_grad]
        self._optimizer = optimizer_for(self._network, self._criterion, self._learning, recipe)
        self._scheduler = scheduler_for(self._optimizer, self._learning, recipe)
        self._average = (
            ModelEmaV3(self._network, decay=self._learning.ema_decay, use_warmup=True, warmup_power=3 / 4)
            if recipe.ema
            else None
        )
        self._model, self._stepper = accelerator.prepare(self._network, self._optimizer)
        self._pictures(found, workers)
        self._epoch, self._first, self._updates = 0, 0, 0
        self._sums: dict[str, float] = {}
        self._log: list[dict[str, Any]] = []
        self._resume()

    def _pictures(self, found: Parts, workers: int) -> None:
        from timm.data.transforms_factory import create_transform

        config, seed = self._built.data_config, self._learning.seed
        process, processes = self._accelerator.process_index, self._accelerator.num_processes
        channels, pins = config["input_size"][0], self._accelerator.device.type == "cuda"
        varied = read.transform_for(config, self._learning.augment, self._learning.flip)
        plain: Any = create_transform(**config, is_training=False)
        self._train_order = read.Order(len(found.train), self._recipe.steps, process, processes, seed)
        measured = math.ceil(len(found.val) / max(self._recipe.batch_size, processes))
        self._val_order = read.Order(len(found.val), measured, process, processes, None)
        self._train = read.loader(read.Pictures(found.train, varied, channels, seed), self._train_order, workers, pins)
        self._val = read.loader(read.Pictures(found.val, plain, channels, seed), self._val_order, workers, pins)

    def work(self) -> dict[str, Any]:
        """Trains from where it is to the end.

        Returns:
            The best epoch with its accuracy, and the last one's.

        Raises:
            Stopped: The loss is no number, memory is too small, a picture is gone, or a signal came.
            UsageError: The method cannot train this network.
        """
        epochs, steps = self._learning.epochs, self._recipe.steps
        speaks = self._accelerator.is_main_process
        board = self._board() if speaks and self._order.tensorboard and self._epoch < epochs else None
        with Stop() as stop, Bar(epochs * steps, self._updates, speaks) as bar:
            while self._epoch < epochs:
                self._run_epoch(bar, stop)
                row, is_best = self._end_epoch()
                if board is not None:
                    board.add(row)
                if speaks:
                    say_epoch(row, epochs, is_best)
        if board is not None:
            board.close()
        best = self._best()
        assert best is not None
        return {
            "epochs": len(self._log), "best_epoch": best["epoch"], "best_top1": best["val_top1"],
            "last_top1": self._log[-1]["val_top1"],
        }  # fmt: skip

    def _board(self) -> Board:
        return Board(self._folder.path / "tensorboard", self._epoch + 1)

    def _run_epoch(self, bar: Bar, stop: Stop) -> None:
        """The steps of an epoch that are left."""
        self._train_order.epoch, self._train_order.first = self._epoch, self._first
        self._model.train()
        self._criterion.train()
        with self._explained(), memory_explained(self._recipe.batch_size, self._built.label):
            for batch in read.read(self._train):
                wants_stop = self._step(batch, stop.signum is not None)
                self._first += 1
                sums = self._sums
                bar.step(self._epoch, self._learning.epochs, sums["loss"] / sums["n"], sums["correct"] / sums["n"])
                is_last = self._first == self._recipe.steps
                every = self._order.save_every
                if wants_stop or (every and self._first % every == 0 and not is_last):
                    self._save_state()
                if wants_stop:
                    raise Interrupted(
                        f"stopped at step {self._first} of epoch {self._epoch + 1}; the same command goes on",
                        stop.signum or 15,
                    )

    def _step(self, batch: Batch, wants_stop: bool) -> bool:
        """One step on this process's share; whether any process was asked to stop."""
        accelerator, device = self._accelerator, self._accelerator.device
        images, targets = (part.to(device, non_blocking=True) for part in batch)
        read.seed_step(self._learning.seed, self._updates, accelerator.process_index, device)
        mixed_images, mixed_targets = (images, targets) if self._mixer is None else mixed(self._mixer, images, targets)
        self._stepper.zero_grad()
        with accelerator.autocast():
            loss, logits, parts = self._criterion(self._model, mixed_images, mixed_targets)
        # processes may have one picture more or less: all pictures count the same
        count = self._train_order.step_size(self._first)
        accelerator.backward(loss * (len(images) * accelerator.num_processes / count))
        for parameter in self._own:  # not in the model, so not averaged with it
            if parameter.grad is not None:
                mean = accelerator.reduce(parameter.grad, "mean")
                assert isinstance(mean, Tensor)
                parameter.grad = mean
        norm = self._clip()
        names = ["loss", "correct", "n", "stop", *sorted(f"part_{name}" for name in parts)]
        values = [loss.detach() * len(images), (logits.argmax(1) == targets).sum(), len(images), float(wants_stop)]
        values += [parts[name.removeprefix("part_")] * len(images) for name in names[4:]]
        numbers = self._summed(names, values)
        self._check(numbers["loss"], norm)
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        self._stepper.step()
        self._updates += 1
        if self._scheduler is not None:
            self._scheduler.step_update(self._updates)
        if self._average is not None:
            self._average.update(self._network, step=self._updates)
        stops = numbers.pop("stop") > 0
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["lr"] = rate
        return stops

    def _clip(self) -> float:
        """Shortens the gradient; its length before."""
        parameters = [*(p for p in self._network.parameters() if p.requires_grad), *self._own]
        limit = self._learning.clip or math.inf
        return float(self._accelerator.clip_grad_norm_(parameters, limit))  # pyright: ignore[reportArgumentType]

    def _summed(self, names: list[str], values: list[Any]) -> dict[str, float]:
        """Numbers added up over all processes."""
        device = self._accelerator.device
        kind = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([torch.as_tensor(value, dtype=kind, device=device) for value in values])
        total = self._accelerator.reduce(stacked, "sum")
        assert isinstance(total, Tensor)
        return dict(zip(names, total.tolist(), strict=True))

    def _check(self, loss: float, norm: float) -> None:
        """Ends the run before a step that would spoil the weights; a scaler of float16 skips such steps itself."""
        if math.isfinite(loss) and (math.isfinite(norm) or self._accelerator.scaler is not None):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {norm} long"
        folder = self._folder.path
        kept = (
            f"{folder / 'last'} is as it was after epoch {self._log[-1]['epoch']}"
            if self._log
            else "no epoch was finished, so there is no checkpoint"
        )
        raise Stopped(
            f"{what} at step {self._first + 1} of epoch {self._epoch + 1} (step {self._updates + 1} in all); {kept}. "
            f"Try a lower --lr than {self._recipe.lr:.2g}, more --warmup, or no --amp, with another -o"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what can be done about a method that cannot train this network."""
        try:
            yield
        except (TypeError, ValueError) as error:
            if self._updates or self._order.start.method == "plain":
                raise
            raise UsageError(
                f"--method {self._order.start.method} cannot train {self._built.label}: {error}"
            ) from error

    def _end_epoch(self) -> tuple[dict[str, Any], bool]:
        """Measures, writes what there is to write; the epoch's row, and whether it is the best."""
        module = self._network if self._average is None else self._average.module
        loss, top1 = self._measure(module)
        sums, count = self._sums, self._sums["n"]
        row = {
            "epoch": self._epoch + 1, "lr": sums["lr"],
            "train_loss": sums["loss"] / count, "train_top1": sums["correct"] / count, "val_loss": loss,
            "val_top1": top1, **{name: value / count for name, value in sums.items() if name.startswith("part_")},
        }  # fmt: skip
        best = self._best()
        is_best = best is None or (top1, -loss) > (best["val_top1"], -best["val_loss"])
        self._log.append(row)
        self._epoch, self._first, self._sums = self._epoch + 1, 0, {}
        if self._accelerator.is_main_process:
            trained = {"epoch": row["epoch"], "val_top1": top1, "val_loss": loss, "method": self._order.start.method}
            for name in ("last", "best") if is_best else ("last",):
                save_network(module, self._folder.path / name, self._classes, self._built.data_config, trained)
            self._folder.write(LOG, log_text(self._log))
        self._save_state()
        return row, is_best

    def _best(self) -> dict[str, Any] | None:
        """The row of the best epoch: most right, then the lowest loss, then the first."""
        return max(self._log, key=lambda row: (row["val_top1"], -row["val_loss"]), default=None)

    @torch.no_grad()
    def _measure(self, module: nn.Module) -> tuple[float, float]:
        """Mean loss and accuracy over the pictures that are not learned from, each read once by one process."""
        from accelerate.utils import broadcast

        for buffer in module.buffers():  # each process has normalised other pictures
            buffer.copy_(broadcast(buffer))
        module.eval()
        loss = torch.zeros((), dtype=torch.float32, device=self._accelerator.device)
        correct, seen = torch.zeros_like(loss), 0
        for images, targets in read.read(self._val):
            images, targets = images.to(loss.device), targets.to(loss.device)
            with self._accelerator.autocast():
                logits = module(images).float()
            loss += F.cross_entropy(logits, targets, reduction="sum")
            correct += (logits.argmax(1) == targets).sum()
            seen += len(images)
        numbers = self._summed(["loss", "correct", "n"], [loss, correct, seen])
        mean = numbers["loss"] / numbers["n"]
        if not math.isfinite(mean):
            self._check(mean, 0.0)
        return mean, numbers["correct"] / numbers["n"]

    def _save_state(self) -> None:
        """Writes all that the next step depends on."""
        if not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        self._folder.save_state(
            {
                "epoch": self._epoch,
                "first": self._first,
                "updates": self._updates,
                "sums": self._sums,
                "log": self._log,
                "network": self._network.state_dict(),
                "average": None if self._average is None else self._average.module.state_dict(),
                "own": [parameter.detach() for parameter in self._own],
                "optimizer": self._optimizer.state_dict(),
                "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
        )

    def _resume(self) -> None:
        """Goes on from the state in the folder, if there is one."""
        state = self._folder.load_state()
        if self._scheduler is not None:
            self._scheduler.step_update(0)
        if state is None:
            return
        self._epoch, self._first, self._updates = state["epoch"], state["first"], state["updates"]
        self._sums, self._log = state["sums"], state["log"]
        self._network.load_state_dict(state["network"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])
        with torch.no_grad():
            for parameter, value in zip(self._own, state["own"], strict=True):
                parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
