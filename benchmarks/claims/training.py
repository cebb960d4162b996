"""Small networks on small pictures: one way to train them and to ask them, the same for all that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from vision.criterion import StepLoss, classification_loss

__all__ = ["Criterion", "Pictures", "cross_entropy", "hits", "logits", "train"]

Criterion = Callable[[nn.Module, Tensor, Tensor], StepLoss]
"""What a training step takes: model, images and targets in, loss out, as `vision.criterion` has it."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures with what is to be said of them.

    Attributes:
        images: `[N, 3, H, W]`, uint8.
        labels: `[N]` classes, or what else the criterion takes as targets.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them, as networks take them: from -1 to 1."""
        return scaled(self.images[index]), self.labels[index]


def scaled(images: Tensor) -> Tensor:
    """uint8 → float32 from -1 to 1."""
    return images.float().div_(127.5).sub_(1)


def cross_entropy(model: nn.Module, images: Tensor, target: Tensor) -> StepLoss:
    """The criterion of plain training."""
    out = model(images)
    loss = classification_loss(out, target)
    return StepLoss(loss, out.detach(), {"ce": loss.detach()})


def train(
    model: nn.Module,
    pictures: Pictures,
    steps: int,
    seed: int,
    criterion: Criterion = cross_entropy,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> None:
    """Trains by AdamW, with a rate that rises for a tenth of the steps and falls by a cosine; ends in evaluation mode.

    The order of the pictures depends on the seed alone, so that methods are compared on the same batches.

    Args:
        model: Where its weights begin is the caller's choice.
        pictures: What it learns from, shuffled anew for each epoch.
        steps: Of the optimiser.
        seed: Of the order, and of `augment`.
        criterion: Gives the loss; if it is a module, its parameters are trained too.
        batch_size: Pictures of a step.
        learning_rate: At its highest.
        weight_decay: Of matrices.
        augment: Changes a batch `[B, 3, H, W]`, uint8.
    """
    trained = nn.ModuleList([model, criterion] if isinstance(criterion, nn.Module) else [model])
    optimizer = create_optimizer_v2(trained, "adamw", learning_rate, weight_decay)
    schedule = CosineLRScheduler(
        optimizer, steps, warmup_t=round(0.1 * steps), warmup_lr_init=learning_rate / 25, t_in_epochs=False
    )
    generator = torch.Generator().manual_seed(seed)
    trained.train()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(pictures), generator=generator)
        index, order = order[:batch_size], order[batch_size:]
        images = pictures.images[index]
        images = images if augment is None else augment(images, generator)
        schedule.step_update(step)
        optimizer.zero_grad()
        criterion(model, scaled(images), pictures.labels[index]).loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    trained.eval()


@torch.inference_mode()
def logits(model: nn.Module, pictures: Pictures, batch_size: int = 250) -> Tensor:
    """What a network in evaluation mode says of pictures, `[N, num_classes]`."""
    indices = torch.arange(len(pictures)).split(batch_size)
    return torch.cat([model(pictures.batch(index)[0]) for index in indices])


def hits(model: nn.Module, pictures: Pictures) -> NDArray[np.float64]:
    """Of each picture whether its class was given, `[N]`, 1 or 0."""
    return (logits(model, pictures).argmax(1) == pictures.labels).double().numpy()
