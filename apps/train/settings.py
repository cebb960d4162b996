"""What a training depends on: the options as they were given, and what they come to; importing this stays cheap."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from ..errors import UsageError

__all__ = ["AUGMENTATIONS", "METHODS", "Learning", "Recipe"]

METHODS = ("plain", "dcal", "adl", "sparsifiner")
AUGMENTATIONS = ("none", "light", "strong")

_LEARNING, _SEEING = "How to learn", "How pictures are varied"
_LEAST_STEPS = 8  # an epoch, so that small data do not become one batch
_SMALLEST_BATCH, _LARGEST_BATCH = 16, 64  # below, batch statistics say little


@dataclass(frozen=True)
class Learning:
    """How a network learns; None stands for what suits the data and the model."""

    epochs: Annotated[int, typer.Option(min=1, help="Times all pictures are seen.", rich_help_panel=_LEARNING)] = 20
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures a step, over all processes; 64, fewer with few pictures.",
            rich_help_panel=_LEARNING,
            show_default=False,
        ),
    ] = None
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate; by default by optimiser, batch size and whether there are weights already.",
            rich_help_panel=_LEARNING,
            show_default=False,
        ),
    ] = None
    opt: Annotated[str, typer.Option(help="Any optimiser of timm's.", rich_help_panel=_LEARNING)] = "adamw"
    sched: Annotated[
        str, typer.Option(help="Any schedule of timm's that needs no plateau.", rich_help_panel=_LEARNING)
    ] = "cosine"
    warmup: Annotated[
        float | None,
        typer.Option(
            min=0, help="Epochs of rising rate; a tenth, at most 5.", rich_help_panel=_LEARNING, show_default=False
        ),
    ] = None
    weight_decay: Annotated[float, typer.Option(min=0, help="Of matrices.", rich_help_panel=_LEARNING)] = 0.05
    layer_decay: Annotated[
        float | None,
        typer.Option(
            help="Rate of each layer over that of the next; 0.75 with trained weights, else 1.",
            rich_help_panel=_LEARNING,
            show_default=False,
        ),
    ] = None
    smoothing: Annotated[float, typer.Option(min=0, max=0.9, help="Label smoothing.", rich_help_panel=_LEARNING)] = 0.1
    clip: Annotated[float, typer.Option(min=0, help="Longest gradient; 0 for any.", rich_help_panel=_LEARNING)] = 1.0
    ema: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Keep an average of the weights; on from 200 steps.",
            rich_help_panel=_LEARNING,
            show_default=False,
        ),
    ] = None
    ema_decay: Annotated[float, typer.Option(min=0, max=1, help="Its memory.", rich_help_panel=_LEARNING)] = 0.9998
    seed: Annotated[int, typer.Option(min=0, help="Another one, another run.", rich_help_panel=_LEARNING)] = 0
    augment: Annotated[
        str,
        typer.Option(
            metavar="|".join(AUGMENTATIONS),
            help="Crops, flips and colours; strong adds RandAugment and erasing.",
            rich_help_panel=_SEEING,
        ),
    ] = "light"
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of them.", rich_help_panel=_SEEING)] = True
    mixup: Annotated[float, typer.Option(min=0, help="Alpha of mixup; 0 for none.", rich_help_panel=_SEEING)] = 0.0
    cutmix: Annotated[float, typer.Option(min=0, help="Alpha of CutMix; 0 for none.", rich_help_panel=_SEEING)] = 0.0

    def check(self) -> None:
        """Finds mistakes that typer does not.

        Raises:
            UsageError: A choice that does not exist, or a number that makes no sense.
        """
        if self.augment not in AUGMENTATIONS:
            raise UsageError(f"--augment {self.augment}: expected {', '.join(AUGMENTATIONS)}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"--lr {self.lr}: expected a number above 0, such as 5e-4")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UsageError(f"--layer-decay {self.layer_decay}: expected a number above 0, at most 1")
        if self.warmup is not None and self.warmup >= self.epochs:
            raise UsageError(f"--warmup {self.warmup:g}: expected fewer epochs than there are, {self.epochs}")

    def recipe(self, pictures: int, trained: bool) -> Recipe:
        """Fills in what was left open.

        Args:
            pictures: How many are learned from.
            trained: Whether the network starts from trained weights.

        Raises:
            UsageError: The batch is larger than the data.
        """
        batch = self.batch_size
        if batch is None:
            suited = 2 ** int(math.log2(max(1, pictures / _LEAST_STEPS)))
            batch = min(max(_SMALLEST_BATCH, min(_LARGEST_BATCH, suited)), pictures)
        if batch > pictures:
            raise UsageError(
                f"--batch-size {batch} is larger than the {pictures} pictures to learn from; try "
                f"{max(1, pictures // _LEAST_STEPS)}"
            )
        steps = math.ceil(pictures / batch)
        warmup = min(5.0, self.epochs / 10) if self.warmup is None else self.warmup
        decay = (0.75 if trained else 1.0) if self.layer_decay is None else self.layer_decay
        return Recipe(
            batch_size=batch,
            steps=steps,
            lr=_rate(self.opt, batch, trained) if self.lr is None else self.lr,
            warmup_steps=round(warmup * steps),
            layer_decay=decay,
            ema=steps * self.epochs >= 200 if self.ema is None else self.ema,
        )


def _rate(opt: str, batch: int, trained: bool) -> float:
    """A learning rate that suits: by the root of the batch size for optimisers that scale gradients, else by itself."""
    if "sgd" in opt or opt.startswith(("momentum", "nesterov")):
        return (0.01 if trained else 0.1) * batch / 256
    return 1e-3 * math.sqrt(batch / 64)  # layer decay makes it smaller where there are weights already


@dataclass(frozen=True)
class Recipe:
    """What was left open, filled in.

    Attributes:
        batch_size: Pictures a step, over all processes.
        steps: Of an epoch.
        lr: The highest learning rate.
        warmup_steps: Over which it rises.
        layer_decay: Rate of each layer over that of the next.
        ema: Whether an average of the weights is kept.
    """

    batch_size: int
    steps: int
    lr: float
    warmup_steps: int
    layer_decay: float
    ema: bool

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)
