"""Which pictures a training learns from and is measured on, in which order, and how each is varied.

Order and variation are functions of seed, epoch and place alone: a run that goes on in the middle of an epoch sees what
it would have seen, whatever processes read the pictures.
"""

from __future__ import annotations

import csv
import io
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..batch.decode import Unreadable, read_source
from ..batch.sources import encode_path
from ..errors import Stopped, UsageError
from ..labelled import Labelled, find, splits

__all__ = [
    "Batch",
    "Order",
    "Parts",
    "Pictures",
    "loader",
    "parts",
    "read",
    "seed_everything",
    "seed_step",
    "transform_for",
]

_ORDER, _SAMPLE, _STEP, _HOLD_OUT = range(4)  # what randomness is for, so that no two uses share any


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*numbers: int) -> None:
    """Makes all that follows on the CPU depend on these numbers: Python's, numpy's and torch's randomness."""
    seed = _seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - it is what timm draws from
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which is slow for every picture


def seed_step(seed: int, step: int, process: int, device: torch.device) -> None:
    """The same for one step of one process, on its device too: dropout, mixup and whatever a criterion draws."""
    seed_everything(_STEP, seed, step, process)
    if device.type != "cpu":
        torch.manual_seed(_seed(_STEP, seed, step, process))


@dataclass(frozen=True)
class Parts:
    """What is learned from and what is measured on, with the same classes.

    Attributes:
        train: The former.
        val: The latter.
        is_held_out: Whether `val` was chosen here.
    """

    train: Labelled
    val: Labelled
    is_held_out: bool = False

    def val_list(self) -> str | None:
        """What was held out as a CSV that `find` reads; None where it cannot be written as one, or was given."""
        paths = [os.path.abspath(source.path) for source in self.val.sources]
        is_written = all(source.member is None for source in self.val.sources) and all(map(str.isprintable, paths))
        if not self.is_held_out or not is_written:
            return None
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["path", "label"])
        rows.writerows(zip(paths, (self.val.classes[target] for target in self.val.targets), strict=True))
        return text.getvalue()


def parts(data: str, val_share: float, seed: int, note: Callable[[str], None]) -> Parts:
    """Finds both parts of a data set; of one that is not divided, a share of each class is held out.

    Args:
        data: As `apps.labelled.find` takes it.
        val_share: Which share, at least one picture a class.
        seed: Of the choice.
        note: Told what the user should know.

    Raises:
        UsageError: There is nothing to learn from, or a class that cannot be both learned and measured.
    """
    there = splits(data)
    train = find(data, "train" if "train" in there else None)
    if len(train.classes) < 2:
        raise UsageError(f"{train.where} has one class, {', '.join(train.classes)}; there is nothing to tell apart")
    if "val" in there and "train" in there:
        return _given(train, find(data, "val"), note)
    return _held_out(train, val_share, seed, note)


def _given(train: Labelled, val: Labelled, note: Callable[[str], None]) -> Parts:
    val = val.numbered(train.classes, train.where)
    if shared := {source.name for source in train.sources} & {source.name for source in val.sources}:
        raise UsageError(f"{len(shared)} pictures are in both train and val, such as {encode_path(min(shared))}")
    single = [name for name, count in zip(train.classes, train.counts(), strict=True) if count == 1]
    if single:
        note(f"classes with one picture to learn from: {', '.join(single)}")
    unmeasured = [name for name, count in zip(val.classes, val.counts(), strict=True) if not count]
    if unmeasured:
        note(f"classes without a picture in val, which are not measured: {', '.join(unmeasured)}")
    return Parts(train, val)


def _held_out(data: Labelled, share: float, seed: int, note: Callable[[str], None]) -> Parts:
    single = [name for name, count in zip(data.classes, data.counts(), strict=True) if count < 2]
    if single:
        raise UsageError(
            f"classes with one picture: {', '.join(single)}; expected two or more, one to learn from and one to "
            "measure on. Add pictures, take the class out, or divide the data into train/ and val/"
        )
    targets = np.asarray(data.targets)
    drawn = np.random.default_rng([_HOLD_OUT, seed])
    held: list[int] = []
    for number in range(len(data.classes)):
        members = drawn.permutation(np.flatnonzero(targets == number))
        held += members[: min(len(members) - 1, max(1, round(share * len(members))))].tolist()
    note(f"{len(held):,} of {len(data):,} pictures are held out to measure on")
    kept = sorted(set(range(len(data))) - set(held))
    return Parts(data.take(kept), data.take(sorted(held)), is_held_out=True)


def transform_for(config: dict[str, Any], augment: str, flip: bool) -> Callable[[Any], Tensor]:
    """timm's transform of pictures that are learned from.

    Args:
        config: timm's description of the input.
        augment: One of `AUGMENTATIONS`.
        flip: Whether half of the pictures are mirrored.

    Returns:
        From an RGB picture to a normalised tensor `[C, H, W]`.
    """
    from timm.data.transforms_factory import create_transform

    create: Any = create_transform
    common: dict[str, Any] = {"input_size": config["input_size"], "mean": config["mean"], "std": config["std"]}
    common["interpolation"] = config["interpolation"]
    common["hflip"] = 0.5 if flip else 0.0
    if augment == "none":
        return create(**config, is_training=False)
    if augment == "light":
        return create(**common, is_training=True, scale=(0.5, 1.0), color_jitter=0.2)
    policy = {"scale": (0.2, 1.0), "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    return create(**common, is_training=True, **policy)


Place = tuple[int, int]
"""Epoch and index of a picture."""


class Pictures(Dataset[Any]):
    """Labelled pictures as tensors; indexed by `Place`.

    Args:
        data: The pictures.
        transform: From an RGB picture to a tensor.
        channels: 3, or 1 for a network of grey pictures.
        seed: Of the variation.
    """

    def __init__(self, data: Labelled, transform: Callable[[Any], Tensor], channels: int, seed: int) -> None:
        self._data = data
        self._transform = transform
        self._channels = channels
        self._seed = seed

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: Place) -> tuple[Tensor, int] | str:
        """Tensor and class, or why there is none: an exception would lose its words on the way from a worker."""
        epoch, index = place
        source = self._data.sources[index]
        seed_everything(_SAMPLE, self._seed, epoch, index)
        try:
            image = read_source(source)
            return self._transform(image.convert("L") if self._channels == 1 else image), self._data.targets[index]
        except Unreadable as error:
            return f"{encode_path(source.name)}: {error}"


class Batch(NamedTuple):
    """Pictures of one step."""

    images: Tensor
    """`[B, C, H, W]`, normalised."""
    targets: Tensor
    """`[B]`."""


def _collate(samples: Sequence[tuple[Tensor, int] | str]) -> Batch | str:
    if failed := [sample for sample in samples if isinstance(sample, str)]:
        return "; ".join(failed)
    good = [sample for sample in samples if not isinstance(sample, str)]
    return Batch(torch.stack([image for image, _ in good]), torch.tensor([target for _, target in good]))


class Order(Sampler[list[Place]]):
    """The share of one process of each step's pictures.

    Every picture comes once an epoch, in steps of nearly the same size: no short last one.

    Args:
        count: How many pictures there are.
        steps: Of an epoch.
        process: Number of this process.
        processes: How many there are.
        seed: Of the order; None for the order of the data.
    """

    def __init__(self, count: int, steps: int, process: int, processes: int, seed: int | None) -> None:
        self._count, self._steps = count, steps
        self._process, self._processes = process, processes
        self._seed = seed
        self.epoch, self.first = 0, 0

    def step_size(self, step: int) -> int:
        """How many pictures all processes together have in a step."""
        return len(np.array_split(np.arange(self._count), self._steps)[step])

    def __iter__(self) -> Iterator[list[Place]]:
        """The steps of `epoch` from `first` on."""
        order = np.arange(self._count)
        if self._seed is not None:
            order = np.random.default_rng([_ORDER, self._seed, self.epoch]).permutation(order)
        for step in np.array_split(order, self._steps)[self.first :]:
            share = np.array_split(step, self._processes)[self._process]
            yield [(self.epoch, int(index)) for index in share]


def _alone(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main process handles it and ends those that read by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def loader(pictures: Pictures, order: Order, workers: int, pins: bool) -> DataLoader[Any]:
    """Reads pictures in that order, in processes beside this one if `workers` is not 0."""
    return DataLoader(
        pictures,
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_alone,
        pin_memory=pins,
    )


def read(batches: DataLoader[Any]) -> Iterator[Batch]:
    """The batches.

    Raises:
        Stopped: A picture could not be read.
    """
    for batch in batches:
        if isinstance(batch, str):
            raise Stopped(f"a picture can no longer be read, and none is learned from in its place: {batch}")
        yield batch
